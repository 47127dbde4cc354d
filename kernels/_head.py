"""The two products of a frozen head, a chunk of rows at a time, in buffers of a byte budget.

    logits = hidden · weightᵀ + bias        d_hidden = d_logits · weight

cuBLAS, or oneDNN on a CPU, makes them; the (T, V) logits never exist as a whole.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.kernels._triton import cdiv

# The default budget, raised to what _MIN_ROWS rows need: fewer make the products inefficient.
_BUDGET_BYTES = 256 << 20
_MIN_ROWS = 512
_ROWS_MULTIPLE = 128
# The buffer's rows start at a multiple of this many logits, whatever V, for 16-byte loads.
_ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class Buffers:
    """The temporaries of a call, sized by the byte budget."""

    logits: Tensor  # (rows, V), rows padded to the alignment
    d_logits: Tensor  # (rows, V): logits itself, or in the dtype of the weight beside fp32 logits
    tile: int  # vocabulary entries of weight upcast at a time; 0: the products upcast

    @classmethod
    def allocate(
        cls,
        hidden: Tensor,
        weight: Tensor,
        fp32_logits: bool,
        budget_bytes: int | None,
        reuse_logits: bool = True,
    ) -> Buffers:
        """Make the buffers for hidden (T, D) and weight (V, D).

        reuse_logits: False where each product allocates its own logits.
        """
        (tokens, width), vocab = hidden.shape, len(weight)
        stride = cdiv(vocab, _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        widen = fp32_logits and hidden.dtype in (torch.bfloat16, torch.float16)
        fused = widen and hidden.is_cuda and torch.version.hip is None
        tile, row_bytes = 0, stride * hidden.element_size()
        if fused:
            row_bytes += stride * 4
        elif widen:
            row_bytes = (stride + 2 * width) * 4  # a chunk of hidden and d_hidden is upcast as well
        if budget_bytes is None:
            budget_bytes = max(_BUDGET_BYTES, _MIN_ROWS * row_bytes)
        if widen and not fused:
            tile = max(1, min(vocab, budget_bytes // 4 // max(1, width * 4)))
            budget_bytes -= tile * width * 4
        rows = _chunk_rows(tokens, row_bytes, budget_bytes)
        dtype = torch.float32 if widen else hidden.dtype
        logits = hidden.new_empty(rows, stride if reuse_logits else 0, dtype=dtype)[:, :vocab]
        d_logits = hidden.new_empty(rows, stride)[:, :vocab] if fused else logits
        return cls(logits, d_logits, tile)


def _chunk_rows(tokens: int, row_bytes: int, budget_bytes: int) -> int:
    """Return the rows of a chunk: within budget, a multiple of 128 if so many fit, all equal."""
    max_rows = max(1, budget_bytes // max(1, row_bytes))
    unit = _ROWS_MULTIPLE if max_rows >= _ROWS_MULTIPLE else 1
    chunks = max(1, cdiv(tokens, max_rows // unit * unit))
    return min(tokens, cdiv(cdiv(tokens, chunks), unit) * unit)


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


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, tile: int) -> None:
    """Write hidden · weightᵀ + bias to logits, in the dtype of logits."""
    if tile:
        hidden = hidden.to(logits.dtype)
        for start in range(0, len(weight), tile):
            entries = slice(start, start + tile)
            # The upcast tile has no name: it is freed before the next one is made.
            torch.mm(hidden, weight[entries].to(logits.dtype).t(), out=logits[:, entries])
    elif logits.dtype != hidden.dtype:
        torch.mm(hidden, weight.t(), out_dtype=logits.dtype, out=logits)
    elif bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        torch.addmm(bias, hidden, weight.t(), out=logits)
        return
    if bias is not None:
        logits += bias


def product_back(
    d_logits: Tensor, weight: Tensor, d_hidden: Tensor, factor: float, tile: int
) -> None:
    """Write factor · d_logits · weight to d_hidden; the factor is applied before rounding."""
    if tile:
        assert factor == 1, "fp32 logits need no scale of their own"
        wide_d_hidden = d_logits.new_zeros(d_hidden.shape)
        for start in range(0, len(weight), tile):
            entries = slice(start, start + tile)
            wide_d_hidden.addmm_(d_logits[:, entries], weight[entries].to(d_logits.dtype))
        d_hidden.copy_(wide_d_hidden)
    elif factor == 1:
        torch.mm(d_logits, weight, out=d_hidden)
    else:
        torch.addmm(d_hidden, d_logits, weight, beta=0, alpha=factor, out=d_hidden)
