"""The C++ extension (csrc/), or plain torch and numpy where it was not built.

Of the extension this module uses what moves weights; `kernels/_cpp.py` uses the kernels in it.
HFPRUNE_NATIVE=0 turns both off for a whole run.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.errors import one_line

_C: Any = None
UNUSED_REASON: str | None = None  # why the extension is not used, or None
try:
    from hfprune_fast import _C
except ImportError as error:
    UNUSED_REASON = one_line(error)
if os.environ.get("HFPRUNE_NATIVE") == "0":
    _C, UNUSED_REASON = None, "HFPRUNE_NATIVE=0"

_CHUNK_BYTES = 16 << 20


def description() -> str:
    """Return a short text: what moves the weights on this machine."""
    if _C is not None:
        return f"C++ extension ({_C.instructions()})"
    return f"plain torch, slower: the C++ extension is not in use ({UNUSED_REASON})"


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
    for rows in range(0, shape[0], step):  # each write ends before the next bytes to read
        part = slice(rows, rows + step)
        result[part] = source[kept[part]] if axis == 0 else source[part].index_select(1, kept)
    return result


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def write_tensor(
    file: int, offset: int, source: Any, *, exponent: int, axis: int = 0, keep: Any = None
) -> bool:
    """Write an array, or what `keep` leaves of it along `axis`, to an open file.

    Several threads may write to one file at once: the position of the file is not used.

    Args:
        file: a file descriptor, open for writing.
        offset: bytes from the start of the file.
        source: a contiguous numpy array of unsigned integers, the bits of the values.
        exponent: a value is NaN or infinite when these bits are all set in it.
        axis, keep: sorted, distinct int64 indices into a vector, or a matrix's rows or columns.

    Returns:
        Whether all values written are finite.

    Raises:
        ValueError: indices out of order or range; nothing was written.
        OSError: the system refuses, as on a full disk.

    Memory: a block of 256 KiB; without the extension, what is kept, three times.
    """
    rows, columns = (*source.shape, 1, 1)[:2]
    if _C is not None:
        sizes = {"rows": rows, "columns": columns, "item_bytes": source.itemsize}
        return bool(
            _C.write(file, offset, source, exponent=exponent, axis=axis, keep=keep, **sizes)
        )
    kept = source if keep is None else source.take(keep, axis=axis)
    view = memoryview(kept.reshape(-1).view(np.uint8))
    while len(view):
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
    bits = kept.dtype.type(exponent)
    return not bool(((kept & bits) == bits).any())
