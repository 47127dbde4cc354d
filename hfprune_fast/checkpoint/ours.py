"""What a run may replace or delete: files recognised as ours, and nothing that it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hfprune_fast.errors import OutputError

# The metadata keys of our safetensors files.
SCORES, STATE = "hfprune_scores", "hfprune_state"


def is_ours(path: Path, key: str) -> bool:
    """Return whether a file, no link to one, begins as our safetensors files of a kind do.

    Only its first bytes are read: a damaged file of ours is still ours.
    """
    return begins_with(path, f'{{"__metadata__":{{"{key}":'.encode(), after=8)


def begins_with(path: Path, start: bytes, after: int = 0) -> bool:
    """Return whether a file, no link to one, holds these bytes after its first few."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(after + len(start))[after:] == start
    except OSError:
        return False


def real(path: Path) -> Path:
    """Return the path with all links followed; unlike `resolve`, also of a link to itself."""
    return Path(os.path.realpath(path))


def files_of(place: Path) -> Iterator[Path]:
    """Yield a file, or all files and links in a folder, at any depth."""
    if place.is_dir():
        yield from (path for path in place.rglob("*") if path.is_symlink() or not path.is_dir())
    else:
        yield place


def check_not_read(outputs: Iterable[Path], read: Iterable[Path], argument: str = "out") -> None:
    """Refuse outputs that are, contain or lie in what a run reads, with all links followed.

    Args:
        outputs: files and folders that the run will write or delete.
        read: files, which may be links, and folders, which count with all files in them.
        argument: what an output is called in the error.
    """
    targets = [(out, real(out), _identity(out)) for out in outputs]
    for place in read:
        for path in (place, *files_of(place)):
            found, identity = real(path), _identity(path)
            for out, target, known in targets:
                same = identity is not None and identity == known
                inside = path == place and found in target.parents
                if same or inside or target == found or target in found.parents:
                    raise OutputError(
                        f"{argument} {out} is, is inside or is above {path}, which is never "
                        "written to; choose another place"
                    )


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what a file is known by under all of its names; None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
