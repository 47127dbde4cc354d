"""What an interrupted run left beside its output, and whether it is of this run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hfprune_fast.errors import OutputError, ResumeError, printable


def beside(out: Path, suffix: str) -> Path:
    """Return where a run to an output keeps what it is resumed from."""
    if not out.name:
        raise OutputError(f"out {out} is a folder that exists; name one below it")
    return out.with_name(f"{out.name}.{suffix}")


def check_left(
    left: Path,
    is_ours: Callable[[Path], bool],
    command: str,
    *,
    resume: bool,
    force: bool,
) -> None:
    """Refuse what an interrupted run left, unless it is to be resumed, or `force` discards it.

    It is still there afterwards: a run that is refused for another reason loses nothing.

    Raises:
        ResumeError: neither is given, or it is not what `command` leaves.
    """
    if not os.path.lexists(left):
        return
    if not is_ours(left):
        raise ResumeError(
            f"{left} is not what an interrupted `hfprune {command}` left, or is damaged or holds "
            "other files; move it away, or choose another out"
        )
    if not resume and not force:
        raise ResumeError(
            f"an interrupted run has left {left}; --resume continues it, --force discards it"
        )


def differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return a line for each key whose values differ; both are as JSON has them."""
    return [
        f"{key:.40} {short(found.get(key))}, not {short(expected.get(key))}"
        for key in dict.fromkeys([*expected, *found])
        if found.get(key) != expected.get(key)
    ]


def of_another_run(left: Path, differences: list[str]) -> ResumeError:
    """Return the error that names the first differences."""
    return ResumeError(
        f"{left} is of another run: {'; '.join(differences[:8])}; --force discards it and starts "
        "again"
    )


def short(value: Any) -> str:
    """Return a value as a message shows it; of a hash, the first digits."""
    text = printable(str(value))
    return text if len(text) <= 20 else f"{text[:12]}…"
