"""Safetensors files, mapped for reading and written tensor by tensor in any order."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from hfprune_fast.checkpoint import native
from hfprune_fast.errors import CheckpointError, one_line

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2}
# All of these bits are set in a value that is NaN or infinite.
_EXPONENT_BITS = {"F64": 0x7FF << 52, "F32": 0x7F80_0000, "BF16": 0x7F80, "F16": 0x7C00}
_ALIGN_BYTES = 64  # where the data start


class SafetensorsFile:
    """A safetensors file, mapped; the safetensors library has validated its header.

    `tensors` is {name: (dtype, shape, begin, end)} in the order of the data, in bytes from the
    start of the file; `metadata` a dict of strings or None. If another process truncates the file
    while it is mapped, reading the lost part ends this process (SIGBUS).

    Raises:
        CheckpointError: the file is damaged, of another format or unreadable, in one line that
            names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
                raise ValueError("not a regular file")
            with safe_open(path, framework="np"):
                pass
            with path.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors = _parse_header(self._mapped)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None
        except (SafetensorError, ValueError, RecursionError) as error:
            reason = one_line(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: {reason}; download it again"
            ) from None
        self._view = memoryview(self._mapped)

    def data(self, name: str, *, prefetch: bool = True) -> memoryview:
        """Return the bytes of a tensor, in the pages of the file; they are read only when used.

        With `prefetch`, the system starts to read them now.
        """
        _, _, begin, end = self.tensors[name]
        if prefetch:
            self._advise("MADV_WILLNEED", begin // mmap.PAGESIZE * mmap.PAGESIZE, end)
        return self._view[begin:end]

    def release(self, name: str) -> None:
        """Let the system take back the memory behind a tensor's bytes; they can be read again."""
        _, _, begin, end = self.tensors[name]
        if end < len(self._mapped):  # whole pages only: the others have neighbours' bytes too
            end = end // mmap.PAGESIZE * mmap.PAGESIZE
        self._advise("MADV_DONTNEED", -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end)

    def _advise(self, advice: str, begin: int, end: int) -> None:
        if begin < end and hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # a refused hint only costs time
                self._mapped.madvise(getattr(mmap, advice), begin, end - begin)


def _parse_header(file: mmap.mmap) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """Return the metadata and tensors of a file whose header has been validated."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start].decode("utf-8"), object_pairs_hook=_distinct)
    metadata = header.pop("__metadata__", None)
    for name, entry in header.items():  # the library takes [dtype, ...] and {"F32": null} as well
        if not isinstance(entry, dict) or not isinstance(entry["dtype"], str):
            raise ValueError(f"invalid entry for {name!r}")
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if math.prod(max(1, size) for size in shape) > sys.maxsize // 8:  # if the array is empty
            raise ValueError(f"shape of {name!r} is larger than memory")
        tensors[name] = (dtype, shape, *(start + offset for offset in entry["data_offsets"]))
    return metadata, tensors


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; the library takes the last of two entries of one name."""
    result = dict(pairs)
    if len(result) < len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"two entries for {name!r}")
    return result


class SafetensorsWriter:
    """A new safetensors file, open for writing until the `with` block ends.

    Args:
        path: must not exist.
        metadata: for the header.
        tensors: (name, dtype, shape) in the order of their data; dtype one of ITEM_BYTES.

    Raises:
        OSError: the file cannot be created, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        metadata: dict[str, str] | None,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    ) -> None:
        header: dict[str, Any] = {}
        if metadata is not None:
            header["__metadata__"] = dict(sorted(metadata.items()))
        end = 0
        for name, dtype, shape in tensors:
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGN_BYTES)
        start = 8 + len(text)
        self._places = {
            name: (dtype, shape, start + header[name]["data_offsets"][0])
            for name, dtype, shape in tensors
        }
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _reserve(self._file, start + end)
            os.pwrite(self._file, len(text).to_bytes(8, "little") + text, 0)
        except BaseException:
            os.close(self._file)
            raise

    def write(
        self, name: str, source: Any, *, axis: int = 0, keep: Any = None, entry: int | None = None
    ) -> bool:
        """Write a tensor; several threads may do so at once for different tensors.

        The other arguments, the result and the errors are those of `native.write_tensor`.

        Args:
            entry: write only this entry of the tensor's first axis.
        """
        dtype, shape, offset = self._places[name]
        if entry is not None:
            count, *rest = shape
            if not 0 <= entry < count:
                raise ValueError(f"tensor {name} has {count} entries, not entry {entry}")
            shape = tuple(rest)
            offset += entry * math.prod(shape) * ITEM_BYTES[dtype]
        size = list(source.shape)
        if keep is not None:
            size[axis] = len(keep)
        if tuple(size) != shape or source.itemsize != ITEM_BYTES[dtype]:
            raise ValueError(
                f"tensor {name} must be {shape} {dtype}, "
                f"got {tuple(size)} of {source.itemsize} bytes each"
            )
        bits = _EXPONENT_BITS.get(dtype, 1)
        finite = native.write_tensor(
            self._file, offset, source, exponent=bits, axis=axis, keep=keep
        )
        return finite or dtype not in _EXPONENT_BITS  # integers are always finite

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _reserve(file: int, size: int) -> None:
    """Allocate a file's whole size, so that a full disk is an error now and not minutes later."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # cannot allocate
            raise
