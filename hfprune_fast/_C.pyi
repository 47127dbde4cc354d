from os import PathLike

from typing_extensions import Buffer

class MalformedError(ValueError):
    """What is wrong with a file, as a clause that follows "FILE has"."""

def instructions() -> str:
    """The best of "avx512_vbmi2", "avx512f" and "portable" on this CPU."""

def compact(
    source: Buffer,
    out: Buffer,
    *,
    rows: int,
    columns: int,
    item_bytes: int,
    axis: int,
    keep: Buffer,
    threads: int,
    portable: bool = False,
) -> None:
    """Move the kept rows (axis 0) or columns (axis 1) of source to the front of out.

    In place where out is source. keep: sorted int64. Raises ValueError before anything is moved.
    """

class MappedFile:
    """A safetensors file, mapped; its buffer is the whole file. Raises MalformedError, OSError."""

    def __init__(self, path: str | PathLike[str]) -> None: ...
    @property
    def metadata(self) -> dict[str, str] | None: ...
    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """{name: (dtype, shape, begin, end)}, bytes from the start of the file, in data order."""

    def will_need(self, begin: int, end: int) -> None: ...
    def done_with(self, begin: int, end: int) -> None: ...
    def __buffer__(self, flags: int) -> memoryview: ...

class Writer:
    """A new safetensors file; its tensors may be written by several threads, in any order."""

    def __init__(
        self,
        path: str | PathLike[str],
        metadata: dict[str, str] | None,
        tensors: list[tuple[str, str, tuple[int, ...]]],
    ) -> None: ...
    def write(self, name: str, source: Buffer, axis: int = 0, keep: Buffer | None = None) -> bool:
        """Write source, or what keep leaves of it along axis; False if NaN or inf was written."""

    def close(self) -> None:
        """Raises ValueError if a tensor was not written."""

    def discard(self) -> None:
        """Close the file as it is, after something went wrong."""
