"""Outputs that appear under their name when they are whole, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hfprune_fast.checkpoint.ours import real
from hfprune_fast.console import human_bytes, say
from hfprune_fast.errors import OutputError, one_line


def check_file(
    out: Path, argument: str, kind: str, is_kind: Callable[[Path], bool], *, force: bool
) -> None:
    """Refuse a file that cannot be written, or that would replace what may not be replaced.

    Args:
        argument: what `out` is called in the error.
        kind: what `force` replaces, such as "a GGUF file"; `is_kind` recognises it.
    """
    target = real(out)
    if os.path.lexists(target):
        if not force:
            raise OutputError(f"{argument} {out} exists; --force replaces {kind}")
        if not is_kind(target):
            raise OutputError(f"{argument} {out} is not {kind}; --force replaces only those")
    check_writable(out, argument=argument)


def check_writable(out: Path, needed_bytes: int = 0, argument: str = "out") -> None:
    """Refuse an output in a place that cannot be written or has too little room."""
    parent = _parent(out)
    if not parent.is_dir():
        raise OutputError(f"{argument} {out} cannot be made: {parent} is a file, expected a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{argument} {out} cannot be made: no permission to write in {parent}")
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{argument} {out} takes {human_bytes(needed_bytes)}, "
            f"but only {human_bytes(free_bytes)} are free in {parent}"
        )


def on_one_disk(first: Path, second: Path) -> bool:
    """Return whether two outputs, which need not exist, are of one file system's room."""
    return _parent(first).stat().st_dev == _parent(second).stat().st_dev


def _parent(out: Path) -> Path:
    """Return the nearest folder, or file in the place of one, above an output."""
    parent = real(out).parent
    while not parent.exists():
        parent = parent.parent
    return parent


def leftovers(out: Path) -> list[str]:
    """Return a line for each thing that killed runs have left beside `out`."""
    target = real(out)
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


def write_whole(
    path: Path, data: bytes, may_replace: Callable[[Path], bool] = lambda _: True
) -> None:
    """Write a file as `whole_file` does."""
    with whole_file(path, may_replace) as partial:
        partial.write_bytes(data)


@contextmanager
def whole_file(path: Path, may_replace: Callable[[Path], bool] = lambda _: True) -> Iterator[Path]:
    """Yield the name of a file beside `path`; it is renamed to `path` once it is on the disk.

    What is at `path` then is replaced if `may_replace` of it, else it stays and this is an error.
    """
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as opened:  # Windows syncs no read-only handle
            os.fsync(opened.fileno())
        if os.path.lexists(path) and not may_replace(path):
            raise OutputError(f"cannot write {path}: something else is there, which stays")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextmanager
def whole_folder(
    out: Path, force: bool, foreign: Callable[[Path], list[str]] = lambda _: []
) -> Iterator[Path]:
    """Yield a folder beside `out` that is renamed to it at the end, or removed on any error.

    What has come into `out` meanwhile stays there: then the new folder gets a name of its own.

    Args:
        force: replace an earlier output.
        foreign: returns what of an earlier output must not be deleted.
    """
    # Not the process id, which is 1 for every run in a container.
    run = uuid.uuid4().hex[:8]
    partial = out.with_name(f".{out.name}.partial-{run}")
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
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"cannot write {out}: {one_line(error)}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = out.with_name(f".{out.name}.replaced-{run}")
    try:
        if force and out.exists():
            _replace(out, partial, replaced, foreign)
        else:
            if out.exists():
                out.rmdir()  # it was empty at the start; what has appeared in it since stays
            partial.rename(out)
        _sync_folder(out.parent)
    except (OSError, OutputError) as error:
        where = ""
        if partial.exists():
            saved = partial.rename(out.with_name(f"{out.name}.new-{run}"))
            where = f"; the new output is whole, in {saved}"
        raise OutputError(f"cannot write {out}: {one_line(error)}{where}") from None


def _replace(out: Path, new: Path, replaced: Path, foreign: Callable[[Path], list[str]]) -> None:
    """Put `new` in the place of `out`, look at what was there, and delete it or put it back."""
    old = new if _exchange(new, out) else replaced
    if old == replaced:
        out.rename(replaced)
        try:
            new.rename(out)
        except BaseException:
            replaced.rename(out)
            raise
    listed = sorted(old.rglob("*"), reverse=True)
    others = [out.name] if old.is_symlink() else foreign(old)
    if others:
        if old == replaced or not _exchange(new, out):
            aside = out.rename(out.with_name(f"{replaced.name}-"))
            old.rename(out)
            aside.rename(new)
        raise OutputError(f"{others[0]} is in it now, which hfprune did not write and keeps")
    try:
        for path in listed:  # and nothing that comes into the folder now
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        old.rmdir()
    except OSError as error:
        say(f"{out} is written; of what it replaces, {old} is left: {one_line(error)}")


def _exchange(new: Path, old: Path) -> bool:
    """Exchange the names of two folders in one step where the system can; say whether it did."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = os.fsencode(new), os.fsencode(old)
    return bool(renameat2(here, names[0], here, names[1], exchange) == 0)
