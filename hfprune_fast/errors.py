"""What a user can do wrong, one class a kind; messages name what was got and what was expected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_POINTER = b"version https://git-lfs.github.com/spec/"
_OUT_OF_MEMORY = (
    *("allocate memory", "out of memory", "enough memory", "alloc failed", "bad alloc"),
    *("could not create a primitive", "could not create a memory", "can't start new thread"),
    "error return without exception set",  # what Python says where it has no room to say more
)

MAX_CHARS = 200  # of what others chose or said


def printable(text: str) -> str:
    """Return text with what a terminal would obey, line ends too, and lone surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """Return a value for a message: at most 60 characters of its repr."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def one_line(error: BaseException) -> str:
    """Return what a library's error says as one line of at most MAX_CHARS printable characters."""
    text = printable(" ".join(str(error).split()))
    if not text or isinstance(error, KeyError):  # its text is the key alone
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 1]}…"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, of Python, torch, CUDA, oneDNN or C++, is that memory ran out."""
    text = str(error).lower().replace("_", " ")
    known = any(part in text for part in _OUT_OF_MEMORY)
    return known or isinstance(error, torch.OutOfMemoryError | MemoryError)


class HFPruneError(ValueError):
    """Base of every error that a change of input can cure; the command line exits with 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))  # with names that others chose


class ArgumentError(HFPruneError):
    """An argument out of its range, or two that exclude each other."""


class CheckpointError(HFPruneError):
    """A model folder that is missing, incomplete, damaged or in a format that is not read."""


class UnsupportedModelError(HFPruneError):
    """A model whose architecture has no gated MLP that this package knows."""


class CalibrationError(HFPruneError):
    """Text or token ids that cannot be turned into token batches for this model."""


class NumericsError(HFPruneError):
    """NaN or inf in weights or activations."""


class ScoresFileError(HFPruneError):
    """A scores file that is not one, is damaged, or belongs to another model."""


class OutputError(HFPruneError):
    """An output that exists, would overwrite its source, or cannot be written."""


class ResumeError(HFPruneError):
    """A saved state that is damaged, of another run, or left over from an interrupted one."""


class MemoryShortageError(HFPruneError):
    """Not enough memory, estimated or met while running, for the smallest plan."""


class ProcessError(HFPruneError):
    """Another process of the run has ended before its part was done."""


@contextmanager
def one_line_errors(what: str, kind: type[HFPruneError] = CheckpointError) -> Iterator[None]:
    """Turn what a library raises over bad input into one line; Rust's panics are BaseExceptions."""
    try:
        yield
    except (HFPruneError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a dozen classes, some of them the library's dependencies'
        if is_out_of_memory(error):
            raise
        raise kind(f"{what}: {one_line(error)}") from error


def refuse_pointer(path: Path, kind: type[HFPruneError]) -> None:
    """Refuse what git leaves in place of a large file where git-lfs is missing."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise kind(f"{path} is a Git LFS pointer, not the file itself; git lfs pull fetches it")
