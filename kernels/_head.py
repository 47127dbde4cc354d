"""The products of a language-model head, a chunk of rows at a time, in buffers of a byte budget.

    logits = hidden · weightᵀ + bias
    d_hidden = d_logits · weight        d_weight = d_logitsᵀ · hidden

cuBLAS, or oneDNN on a CPU, makes them; the (T, V) logits never exist as a whole.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.kernels._triton import cdiv

# The default budget, raised to what these rows need: fewer make the products inefficient.
LOGITS_BUDGET_BYTES, LOGITS_BUDGET_ROWS = 384 << 20, 512
_ROWS_MULTIPLE = 128
# Columns of a product's tile of 128 rows, as cuBLAS has them for large ones.
_TILE_COLUMNS = 256
# The buffer's rows start at a multiple of this many logits, whatever V, for 16-byte loads.
_ROW_ALIGNMENT = 16
# Of d_logits that are upcast at a time for the gradient of the weight, on a CPU.
_UPCAST_BYTES = 4 << 20


@dataclass(frozen=True)
class Head:
    """A head and its input."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)

    def widens(self, fp32_logits: bool) -> bool:
        """Return whether the logits are to be fp32 and the product of the dtypes is not."""
        return fp32_logits and self.hidden.dtype in (torch.bfloat16, torch.float16)

    @property
    def makes_fp32(self) -> bool:
        """Whether cuBLAS can make fp32 of two lower ones; elsewhere they are upcast."""
        return self.hidden.is_cuda and torch.version.hip is None

    @property
    def stride(self) -> int:
        """Logits from a row of a buffer to the next."""
        return cdiv(len(self.weight), _ROW_ALIGNMENT) * _ROW_ALIGNMENT

    def row_bytes(self, fp32_logits: bool, back: bool) -> int:
        """Return the bytes of temporaries a row; back: with those of the product back."""
        if not self.widens(fp32_logits):
            return self.stride * self.hidden.element_size()
        if self.makes_fp32:
            return self.stride * (4 + back * self.hidden.element_size())
        # A chunk of hidden, and of d_hidden, is upcast as well.
        return (self.stride + (1 + back) * self.hidden.shape[1]) * 4


@dataclass(frozen=True)
class Products:
    """The products of a head, in the buffers of a call."""

    head: Head
    buffer: Tensor  # (rows, V) logits, rows padded to the alignment
    d_buffer: Tensor  # (rows, V): buffer itself, or in the dtype of the weight beside fp32 logits
    tile: int  # vocabulary entries of weight upcast at a time; 0: the products upcast
    onednn: Callable[..., Tensor] | None  # makes new tensors instead of using the buffers

    def logits(self, rows: slice) -> Tensor:
        """Return the logits of hidden[rows], at most as many as the buffer has."""
        hidden, weight, bias = self.head.hidden[rows], self.head.weight, self.head.bias
        if self.onednn is not None:
            return self.onednn(hidden, weight, bias)
        logits = self.buffer[: len(hidden)]
        if self.tile:
            hidden = hidden.to(logits.dtype)
            for entries in _slices(len(weight), self.tile):
                # The upcast tile has no name: it is freed before the next one is made.
                torch.mm(hidden, weight[entries].to(logits.dtype).t(), out=logits[:, entries])
        elif logits.dtype != hidden.dtype:
            torch.mm(hidden, weight.t(), out_dtype=logits.dtype, out=logits)
        elif bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            return torch.addmm(bias, hidden, weight.t(), out=logits)
        if bias is not None:
            logits += bias
        return logits

    def gradient(self, logits: Tensor) -> Tensor:
        """Return where the gradient of logits goes: on top of them if their dtype is its own."""
        return logits if self.d_buffer is self.buffer else self.d_buffer[: len(logits)]

    def back(self, d_logits: Tensor, d_hidden: Tensor, factor: float) -> None:
        """Write factor · d_logits · weight to d_hidden; the factor is applied before rounding."""
        weight = self.head.weight
        if self.onednn is not None:
            assert factor == 1, "only fp16 gradients have a scale of their own"
            d_hidden.copy_(self.onednn(d_logits, weight.t(), None))
        elif self.tile:
            assert factor == 1, "fp32 logits need no scale of their own"
            wide = d_logits.new_zeros(d_hidden.shape)
            for entries in _slices(len(weight), self.tile):
                wide.addmm_(d_logits[:, entries], weight[entries].to(d_logits.dtype))
            d_hidden.copy_(wide)
        elif factor == 1:
            torch.mm(d_logits, weight, out=d_hidden)
        else:
            torch.addmm(d_hidden, d_logits, weight, beta=0, alpha=factor, out=d_hidden)

    def add_d_weight(
        self, d_logits: Tensor, rows: slice, d_weight: Tensor, d_bias: Tensor, factor: float
    ) -> None:
        """Add factor · d_logitsᵀ · hidden[rows] and its like of the bias, both fp32 or wider."""
        hidden, wide = self.head.hidden[rows], d_weight.dtype
        if d_logits.dtype == hidden.dtype != wide and self.head.makes_fp32:
            torch.addmm(
                d_weight, d_logits.t(), hidden, alpha=factor, out_dtype=wide, out=d_weight
            )  # fmt: skip
        else:
            hidden = hidden.to(wide)
            tile = max(1, _UPCAST_BYTES // 4 // max(1, len(hidden)))
            if d_logits.dtype == wide:
                tile = max(1, len(d_weight))
            for entries in _slices(len(d_weight), tile):
                upcast = d_logits[:, entries].t().to(wide)
                d_weight[entries].addmm_(upcast, hidden, alpha=factor)
        if d_bias.numel():
            d_bias.add_(d_logits.sum(dim=0, dtype=wide), alpha=factor)


def products_of(
    heads: Sequence[Head], fp32_logits: bool, budget_bytes: int | None, backend: str
) -> tuple[int, list[Products]]:
    """Return the rows of a chunk, and each head's products; the first alone has a gradient."""
    if backend != "triton" and slow_on_this_cpu(heads[0].hidden.dtype):
        fp32_logits |= heads[0].hidden.device.type == "cpu"
    widened = [head.widens(fp32_logits) and not head.makes_fp32 for head in heads]
    row_bytes = sum(head.row_bytes(fp32_logits, head is heads[0]) for head in heads)
    if budget_bytes is None:
        budget_bytes = max(LOGITS_BUDGET_BYTES, LOGITS_BUDGET_ROWS * row_bytes)
    tile = 0
    if any(widened):
        width = max(1, *(head.hidden.shape[1] for head in heads))
        tile = max(1, min(len(heads[0].weight), budget_bytes // 4 // (width * 4)))
        budget_bytes -= tile * width * 4
    rows = _chunk_rows(len(heads[0].hidden), row_bytes, budget_bytes)
    hidden = heads[0].hidden
    if hidden.is_cuda and torch.version.hip is None and rows > _ROWS_MULTIPLE:
        rows = wave_rows(
            len(hidden), budget_bytes // max(1, row_bytes), _shapes(heads),
            torch.cuda.get_device_properties(hidden.device).multi_processor_count,
        )  # fmt: skip
    products = []
    for head, upcast in zip(heads, widened, strict=True):
        onednn = None if backend == "triton" else onednn_linear(head.hidden, head.weight)
        wide = torch.float32 if head.widens(fp32_logits) else head.hidden.dtype
        shape, vocab = (rows, 0 if onednn else head.stride), len(head.weight)
        buffer = d_buffer = head.hidden.new_empty(shape, dtype=wide)[:, :vocab]
        if head is heads[0] and wide != head.hidden.dtype and not upcast:
            d_buffer = head.hidden.new_empty(shape)[:, :vocab]
        products.append(Products(head, buffer, d_buffer, tile * upcast, onednn))
    return max(1, rows), products


def _chunk_rows(tokens: int, row_bytes: int, budget_bytes: int) -> int:
    """Return the rows of a chunk: within budget, a multiple of 128 if so many fit, all equal."""
    max_rows = max(1, budget_bytes // max(1, row_bytes))
    unit = _ROWS_MULTIPLE if max_rows >= _ROWS_MULTIPLE else 1
    chunks = max(1, cdiv(tokens, max_rows // unit * unit))
    return min(tokens, cdiv(cdiv(tokens, chunks), unit) * unit)


def _shapes(heads: Sequence[Head]) -> tuple[tuple[int, int], ...]:
    """Return (columns, summed entries) of each product of a chunk."""
    forward = tuple((len(head.weight), head.hidden.shape[1]) for head in heads)
    return (*forward, (heads[0].hidden.shape[1], len(heads[0].weight)))


@functools.lru_cache(maxsize=256)
def wave_rows(
    tokens: int, max_rows: int, products: tuple[tuple[int, int], ...], multiprocessors: int
) -> int:
    """Return the rows of a chunk for which the products of all chunks take the fewest waves.

    A product of (rows, k) and (k, n) has a tile for each 128 rows and 256 of its n columns; a wave
    is a tile on each multiprocessor, and takes time in proportion to k. The time of all is least
    where the tiles of a product with few columns sit just under a whole number of waves.

    Args:
        tokens: rows in all.
        max_rows: that fit into the budget, at least 128; the result is a multiple of 128 within it,
            or tokens if they are fewer.
        products: (n, k) of each.
        multiprocessors: of the GPU.
    """

    def waves(units: int) -> int:
        return sum(
            cdiv(units * cdiv(columns, _TILE_COLUMNS), multiprocessors) * depth
            for columns, depth in products
        )

    units = cdiv(tokens, _ROWS_MULTIPLE)
    best, least = 1, waves(1) * units
    # Of equals the larger one: fewer launches.
    for chunk in range(2, min(max_rows // _ROWS_MULTIPLE, units) + 1):
        full, rest = divmod(units, chunk)
        time = full * waves(chunk) + (waves(rest) if rest else 0)
        if time <= least:
            best, least = chunk, time
    return min(tokens, best * _ROWS_MULTIPLE)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def slow_on_this_cpu(dtype: torch.dtype) -> bool:
    """Return whether torch's products in a dtype take many times as long here as in float32.

    Without AVX-512 or the like, a product of bfloat16 or float16 whose second factor is not
    transposed runs in plain loops of one thread: 0.7 GFLOP/s, not 58.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return name is not None and supported is not None and not supported()


def onednn_linear(hidden: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    """Return the product x · wᵀ + b of oneDNN for fp32 on an x86 CPU, None elsewhere.

    torch's `mm` calls MKL there, which on AMD's processors takes twice as long.
    """
    x86_cpu = hidden.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    if not x86_cpu or not torch.backends.mkldnn.is_available():
        return None
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    empty = hidden.numel() == 0 or weight.numel() == 0
    if operation is None or hidden.dtype != torch.float32 or empty or not weight.is_contiguous():
        return None
    return lambda x, w, b: operation(x.contiguous(), w, b, "none", [], "")
