"""What moves weights: the C++ extension (csrc/), or plain torch and Python where it was not built.

The only place that decides. HFPRUNE_NATIVE=0 leaves the extension aside for a whole run.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfprune_fast.errors import CheckpointError, one_line

_C: Any = None
WHY_NOT: str | None = None  # why the extension is not used, or None
try:
    from hfprune_fast import _C
except ImportError as error:
    WHY_NOT = one_line(error)
if os.environ.get("HFPRUNE_NATIVE") == "0":
    _C, WHY_NOT = None, "HFPRUNE_NATIVE=0"

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_CHUNK_BYTES = 16 << 20


def description() -> str:
    """Say in a few words what moves the weights here."""
    if _C is not None:
        return f"C++ extension ({_C.instructions()})"
    return f"plain torch, slower: the C++ extension is not in use ({WHY_NOT})"


def compact_rows(
    source: Tensor, keep: Tensor, *, out: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """Keep the rows `keep` of a matrix, in place unless `out` is given.

    Args:
        source: (R, C) of any dtype, contiguous if in place.
        keep: (K,) int64, sorted and distinct.
        out: (K, C), contiguous, of the same dtype; it shares no memory with source.
        threads: of the CPU; by default those of torch.

    Returns:
        `out`; else the (K, C) front of source's memory, what lies behind it being undefined.

    Raises:
        ValueError: shapes or indices that do not fit; nothing was moved.

    Memory: half a megabyte beside source and out. Traffic: the kept bytes, read and written.
    """
    return _compact(source, 0, keep, out, threads)


def compact_columns(
    source: Tensor, keep: Tensor, *, out: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """Keep the columns `keep` of a matrix, in place unless `out` is given: see `compact_rows`.

    source is (R, C) and the result (R, K). Traffic: source read, the kept bytes written.
    """
    return _compact(source, 1, keep, out, threads)


def _compact(
    source: Tensor, axis: int, keep: Tensor, out: Tensor | None, threads: int | None
) -> Tensor:
    if source.dim() != 2 or keep.dim() != 1 or keep.dtype != torch.int64:
        raise ValueError(
            f"expected a matrix and a vector of int64 indices, got {tuple(source.shape)} and "
            f"{tuple(keep.shape)} {keep.dtype}"
        )
    shape = (len(keep), source.shape[1]) if axis == 0 else (source.shape[0], len(keep))
    if out is None and not source.is_contiguous():
        raise ValueError("a matrix is compacted in place only where it is contiguous")
    if out is not None and (
        out.shape != shape or out.dtype != source.dtype or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be {shape} {source.dtype} and contiguous, got {tuple(out.shape)} {out.dtype}"
        )
    if bool((keep.diff() <= 0).any()) or (
        len(keep) and not 0 <= int(keep[0]) <= int(keep[-1]) < source.shape[axis]
    ):
        raise ValueError(f"keep must be sorted and distinct, in 0..{source.shape[axis] - 1}")
    result = source.view(-1)[: shape[0] * shape[1]].view(shape) if out is None else out
    if _C is not None and source.device.type == "cpu" and source.is_contiguous():
        _C.compact(
            _bytes(source),
            _bytes(source if out is None else out),
            rows=source.shape[0],
            columns=source.shape[1],
            item_bytes=source.element_size(),
            axis=axis,
            keep=keep.cpu().contiguous().numpy(),
            threads=threads or torch.get_num_threads(),
        )
        return result
    kept = keep.to(source.device)
    if out is not None:
        torch.index_select(source, axis, kept, out=out)
        return result
    row_bytes = max(1, source.shape[1] * source.element_size())
    step = max(1, _CHUNK_BYTES // row_bytes)
    for rows in range(0, shape[0], step):  # what is written lies before all that is still to read
        part = (
            source.index_select(0, kept[rows : rows + step])
            if axis == 0
            else source[rows : rows + step].index_select(1, kept)
        )
        result[rows : rows + step] = part
    return result


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().view(-1).view(torch.uint8).numpy()


class SafetensorsFile:
    """A safetensors file, mapped; its header is checked before anything is believed.

    `tensors` is {name: (dtype, shape, begin, end)} in the order of the data, `metadata` a dict of
    strings or None.

    Raises:
        CheckpointError: the file is damaged, or none of that format, in one line that names it.
    """

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, str] | None
        self.tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
        self._mapped: Any
        self.path = path
        if _C is not None:
            try:
                self._mapped = _C.MappedFile(path)
            except _C.MalformedError as error:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: it has {error}; "
                    "download it again"
                ) from None
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None
            self.metadata, self.tensors = self._mapped.metadata, self._mapped.tensors
        else:
            self._mapped = _map(path)
            self.metadata, self.tensors = _read_header(self._mapped)
        self._view = memoryview(self._mapped)

    def data(self, name: str, *, ahead: bool = True) -> memoryview:
        """Return a tensor's bytes; they are read from the file ahead of their use, or in it."""
        _, _, begin, end = self.tensors[name]
        if _C is not None and ahead:
            self._mapped.will_need(begin, end)
        return self._view[begin:end]

    def done_with(self, name: str) -> None:
        """Let the system take back the memory behind a tensor's bytes."""
        if _C is not None:
            _, _, begin, end = self.tensors[name]
            self._mapped.done_with(begin, end)


def _map(path: Path) -> mmap.mmap:
    try:
        with safe_open(path, framework="pt"):  # which checks the header
            pass
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({one_line(error)}); download it again"
        ) from None


def _read_header(file: mmap.mmap) -> tuple[dict[str, str] | None, dict[str, Any]]:
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    metadata = header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {
        name: (entry["dtype"], tuple(entry["shape"]), *(start + i for i in entry["data_offsets"]))
        for name, entry in entries
    }
    return metadata, tensors


def new_file(
    path: Path, metadata: dict[str, str] | None, tensors: Sequence[tuple[str, str, tuple[int, ...]]]
) -> Any:
    """Begin a safetensors file of these tensors (name, dtype, shape), in the order of their data.

    Returns an object with `write(name, source, axis=0, keep=None) -> bool` (False: NaN or inf was
    written), which several threads may call at once for different tensors, `close()`, and
    `discard()` for when something went wrong.
    """
    if _C is not None:
        return _C.Writer(path, metadata, list(tensors))
    return _PlainWriter(path, metadata, tensors)


class _PlainWriter:
    """What `_C.Writer` does, in Python; memory: one tensor."""

    def __init__(
        self,
        path: Path,
        metadata: dict[str, str] | None,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    ) -> None:
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        self._places: dict[str, tuple[str, tuple[int, ...], int]] = {}
        end = 0
        for name, dtype, shape in tensors:
            begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            self._places[name] = (dtype, shape, begin)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        self._start = 8 + len(text)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._put(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, source: Any, axis: int = 0, keep: Any = None) -> bool:
        dtype, shape, begin = self._places[name]
        items = np.frombuffer(source, f"u{ITEM_BYTES[dtype]}")
        if keep is not None:
            other = shape[1 - axis] if len(shape) == 2 else 1
            matrix = items.reshape((-1, other) if axis == 0 else (other, -1))
            items = matrix.take(keep, axis=axis)
        self._put(np.ascontiguousarray(items).reshape(-1).view(np.uint8).data, self._start + begin)
        exponent = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF << 52}[dtype]
        return not bool(((items & items.dtype.type(exponent)) == exponent).any())

    def close(self) -> None:
        os.close(self._file)

    discard = close

    def _put(self, data: Any, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            done = os.pwrite(self._file, view, offset)
            view, offset = view[done:], offset + done
