"""Messages on stderr, progress bars, tables, and sizes and times as human-readable text."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hfprune_fast.errors import ArgumentError, printable, shown

_muted = False
_libraries_hidden = False


def mute() -> None:
    """Print nothing from now on; the first process of this run does."""
    global _muted
    _muted = True


@dataclass(frozen=True, eq=False)
class Tolerant:
    """A stream that may be None, closed, full or a broken pipe: what it does not take is lost.

    Messages and bars are no reason to end a run.
    """

    stream: Any

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return bool(self.stream.isatty())
        return False

    def __eq__(self, other: object) -> bool:  # as tqdm tells whether a bar and a message meet
        return self.stream is getattr(other, "stream", other)

    def __hash__(self) -> int:
        return hash(id(self.stream))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def say(message: str) -> None:
    """Print one line to the user on stderr, past a progress bar."""
    if not _muted:
        tqdm.write(f"hfprune: {printable(message)}", file=Tolerant(sys.stderr))


def say_last(message: str) -> None:
    """Print one line to the user on stderr, of every process, after the bars."""
    stderr = Tolerant(sys.stderr)
    stderr.write(f"hfprune: {printable(message)}\n")
    stderr.flush()


def hide_libraries() -> None:
    """Let `library_hidden` work from now on: in a command, which has the process to itself."""
    global _libraries_hidden
    _libraries_hidden = True


@contextmanager
def library_hidden() -> Iterator[None]:
    """Hide what a library writes on stderr meanwhile: panics of Rust print before they raise."""
    try:
        stderr = os.dup(2) if _libraries_hidden else None
    except OSError:  # closed
        stderr = None
    if stderr is None:
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def byte_bar(what: str, total_bytes: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """Show a bar of bytes on stderr; yield the function that takes the bytes processed."""
    with _bar(what, total_bytes, "B", show) as bar:
        yield bar.update


def _bar(what: str, total: int, unit: str, show: bool) -> Any:
    stderr = Tolerant(sys.stderr)
    return tqdm(
        total=total,
        desc=printable(what),
        unit=unit,
        unit_scale=True,
        file=stderr,
        mininterval=0.2 if stderr.isatty() else 30,
        disable=not show or _muted,
    )


@contextmanager
def token_bar(
    what: str,
    total_tokens: int,
    show: bool,
    flops_per_token: int = 0,
    notes: Mapping[str, str] | None = None,
) -> Iterator[Callable[[float], None]]:
    """Show a bar of tokens on stderr, with FLOP/s and peak memory; yield what takes the tokens.

    A token that has passed some of the layers counts as a fraction. What `notes` holds at the time
    is shown too.
    """
    begun, peak_bytes, counted = time.perf_counter(), 0, 0.0
    with _bar(what, total_tokens, "tok", show) as bar:

        def on_progress(tokens: float) -> None:
            nonlocal peak_bytes, counted
            counted += tokens
            if bar.disable:
                return
            peak_bytes = max(peak_bytes, _memory_bytes())
            note()
            # Whole tokens, since the bar prints its count unrounded.
            bar.update(min(round(counted), total_tokens) - bar.n)

        def note() -> None:
            shown = {**(notes or {}), "peak": human_bytes(peak_bytes)}
            if flops_per_token:
                flops = counted * flops_per_token / (time.perf_counter() - begun)
                shown["FLOP/s"] = tqdm.format_sizeof(flops)
            bar.set_postfix(shown, refresh=False)

        yield on_progress
        if notes and not bar.disable:  # the last ones come after the last tokens
            note()


def _memory_bytes() -> int:
    """Return what this process has allocated: on its GPU if it uses one, else in memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def human_bytes(count: int) -> str:
    """Bytes in binary units: 3.4 MiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def human_seconds(seconds: float) -> str:
    """Seconds, minutes or hours: 3.4 min."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def to_path(value: Any, argument: str) -> Path:
    """Return a path, or raise ArgumentError with the argument's name."""
    if not isinstance(value, str | os.PathLike) or "\0" in os.fsdecode(value):
        raise ArgumentError(f"{argument} must be a path, got {shown(value)}")
    return Path(value)


def parse_bytes(size: int | str, argument: str) -> int:
    """Return a size as bytes: 5GB and 5GiB, KB and KiB, MB and MiB are understood."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?\s*", str(size), re.IGNORECASE)
    count = 0.0
    if match is not None:
        base = 1024 if match[3] else 1000
        power = "KMGT".find((match[2] or "").upper()) + 1 if match[2] else 0
        count = float(match[1]) * base**power
    if not 1 <= count < 2**63:
        raise ArgumentError(f"{argument} must be bytes or like 5GB or 512MiB, got {shown(size)}")
    return int(count)


def display_name(model: str | Path) -> str:
    """A model's or text's name as others know it: its hub name, or the last part of its path."""
    path = Path(model)
    if not path.exists():
        return printable(str(model))
    path = path.resolve()
    cache = path.parent.parent
    if path.parent.name == "snapshots" and cache.name.startswith("models--"):
        return printable(cache.name.removeprefix("models--").replace("--", "/", 1))
    return printable(path.name)
