"""Outputs that appear under their name when they are whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfprune_fast.console import human_bytes
from hfprune_fast.errors import OutputError, one_line


def check_writable(out: Path, needed_bytes: int = 0) -> None:
    """Refuse an output in a place that cannot be written or has too little room."""
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"out {out} cannot be made: {parent} is a file, expected a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"out {out} cannot be made: no permission to write in {parent}")
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"out {out} takes {human_bytes(needed_bytes)}, "
            f"but only {human_bytes(free_bytes)} are free in {parent}"
        )


def leftovers(out: Path) -> list[str]:
    """Return a line for each thing that killed runs have left beside `out`."""
    target = out.resolve()
    what = {
        "partial": "is left over from a run that was killed; it can be deleted",
        "replaced": "is an earlier output; its replacement was killed: rename it back or delete it",
    }
    return [
        f"{path} {text}"
        for kind, text in what.items()
        for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"))
    ]


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, to survive a power cut; Windows has no such call."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems sync no folder
                raise
        finally:
            os.close(opened)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it once it is on the disk; replaces an earlier one."""
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextmanager
def whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """Yield a folder beside `out` that is renamed to it at the end, or removed on any error."""
    # Not the process id, which is 1 for every run in a container.
    run = uuid.uuid4().hex[:8]
    partial = out.with_name(f".{out.name}.partial-{run}")
    replaced = out.with_name(f".{out.name}.replaced-{run}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:  # Windows syncs no read-only handle
                    os.fsync(file.fileno())
        for path in (partial, *partial.rglob("*")):
            if path.is_dir():
                _sync_folder(path)
        if force and out.exists():
            out.rename(replaced)
        elif out.exists():
            out.rmdir()  # it was empty at the start; what has appeared in it since stays
        partial.rename(out)
        _sync_folder(out.parent)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {one_line(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists():
            if out.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(out)
