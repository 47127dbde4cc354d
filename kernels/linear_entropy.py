"""Weighted entropy of a language-model head, and its gradient at the head's input.

    z_t = hidden_t · weightᵀ + bias        loss = Σ_t row_weight_t · H(softmax(z_t))

The logits are never whole: rows go through one reused buffer, chunk by chunk. A first product makes
the logits of a chunk, one pass turns them into dloss/dz (`entropy.py`, where the equation is) and a
second product makes dloss/dhidden. That is 4·T·D·V FLOPs, against 6 where the logits are made again
for a backward pass. The head is frozen: there is no gradient of weight or bias.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hfprune_fast.kernels._arguments import check_devices, check_grad_scale, check_transform
from hfprune_fast.kernels._dispatch import resolve_backend, undisturbed
from hfprune_fast.kernels._triton import cdiv
from hfprune_fast.kernels.entropy import entropy_rows, softmax_entropy_grad_reference

# The default budget; more where this many rows, which keep the products efficient, do not fit.
_BUDGET_BYTES = 256 << 20
_LEAST_ROWS = 512
_ROWS_MULTIPLE = 128
# The buffer's rows start at a multiple of this many logits, whatever V, for 16-byte loads.
_ROW_ALIGNMENT = 16
# dz of an fp16 head is at least this many times dloss/dz: at V = 32000 and a row weight of 1/1024
# two thirds of it would be 0 otherwise. |dH/dz| is below 4 for any V up to 300k (most is near one
# peak of p = 1/2), so with weights up to 1 the largest is a quarter of what fp16 holds.
_FP16_DZ_SCALE = 4096.0


def linear_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (loss, dloss/dhidden) with the (T, V) logits whole."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    entropy, d_logits = softmax_entropy_grad_reference(
        logits, row_weight, softcap=softcap, logit_scale=logit_scale
    )
    return (entropy * row_weight).sum(), d_logits @ weight


@dataclass(frozen=True)
class _Buffers:
    """What a call holds beside its input and output, decided by the byte budget."""

    logits: Tensor  # (rows, V), rows padded to the alignment
    d_logits: Tensor  # (rows, V): logits itself, or in the dtype of the weight beside fp32 logits
    tile: int  # vocabulary entries of weight upcast at a time, 0 where the products do it

    @classmethod
    def allocate(
        cls,
        hidden: Tensor,
        weight: Tensor,
        fp32_logits: bool,
        budget_bytes: int | None,
        needed: bool = True,
    ) -> _Buffers:
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
            budget_bytes = max(_BUDGET_BYTES, _LEAST_ROWS * row_bytes)
        if widen and not fused:
            tile = max(1, min(vocab, budget_bytes // 4 // max(1, width * 4)))
            budget_bytes -= tile * width * 4
        rows = _chunk_rows(tokens, row_bytes, budget_bytes)
        dtype = torch.float32 if widen else hidden.dtype
        # Not needed where each product makes its own output.
        logits = hidden.new_empty(rows, stride if needed else 0, dtype=dtype)[:, :vocab]
        d_logits = hidden.new_empty(rows, stride)[:, :vocab] if fused else logits
        return cls(logits, d_logits, tile)


def _chunk_rows(tokens: int, row_bytes: int, budget_bytes: int) -> int:
    """Rows at a time: what fits, a multiple of 128 if that many fit, and chunks of equal size."""
    most = max(1, budget_bytes // max(1, row_bytes))
    unit = _ROWS_MULTIPLE if most >= _ROWS_MULTIPLE else 1
    chunks = max(1, cdiv(tokens, most // unit * unit))
    return min(tokens, cdiv(cdiv(tokens, chunks), unit) * unit)


def _onednn_linear(hidden: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
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


def _product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, tile: int
) -> None:
    """logits = hidden · weightᵀ + bias, in the dtype of logits."""
    if tile:
        hidden = hidden.to(logits.dtype)
        for start in range(0, len(weight), tile):
            entries = slice(start, start + tile)
            # The upcast tile has no name, so that it is gone before the next one is made.
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


def _product_back(
    d_logits: Tensor, weight: Tensor, d_hidden: Tensor, factor: float, tile: int
) -> None:
    """d_hidden = factor · d_logits · weight; the factor meets the sum before it is rounded."""
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


@torch.library.custom_op("hfprune_fast::linear_entropy", mutates_args=())
def _linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    fp32_logits: bool,
    grad_scale: float,
    logits_budget_bytes: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check(hidden, weight, row_weight, bias, logits_budget_bytes)
    check_transform(softcap, logit_scale)
    check_grad_scale(grad_scale)
    backend = resolve_backend(backend, hidden)
    maths_dtype = torch.promote_types(hidden.dtype, torch.float32)
    entropy = hidden.new_empty(hidden.shape[0], dtype=maths_dtype)
    d_hidden = torch.empty_like(hidden)
    linear = _onednn_linear(hidden, weight) if backend == "torch" else None
    buffers = _Buffers.allocate(hidden, weight, fp32_logits, logits_budget_bytes, linear is None)
    dz_scale = grad_scale
    if buffers.d_logits.dtype == torch.float16:
        dz_scale = max(grad_scale, _FP16_DZ_SCALE)
    row_weight = row_weight.to(maths_dtype)
    row_scale = row_weight * dz_scale
    chunk = max(1, buffers.logits.shape[0])
    with undisturbed(hidden):
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            if linear is not None:
                logits = d_logits = linear(hidden[rows], weight, bias)
            else:
                logits = buffers.logits[: rows.stop - start]
                d_logits = buffers.d_logits[: rows.stop - start]
                _product(hidden[rows], weight, bias, logits, buffers.tile)
            entropy[rows] = entropy_rows(
                logits, row_scale[rows], d_logits,
                softcap=softcap, logit_scale=logit_scale, backend=backend,
            )  # fmt: skip
            if linear is not None:
                d_hidden[rows] = linear(d_logits, weight.t(), None)
            else:
                factor = grad_scale / dz_scale
                _product_back(d_logits, weight, d_hidden[rows], factor, buffers.tile)
            del logits, d_logits  # which may be a chunk's own, before the next one's are made
    # Not 0 · NaN where a row of padding has weight 0.
    terms = torch.where(row_weight == 0, 0, entropy.double() * row_weight)
    return terms.sum().to(maths_dtype), d_hidden


@_linear_entropy.register_fake
def _(hidden, *_):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(hidden)


@register_flop_formula(torch.ops.hfprune_fast.linear_entropy)
def _flops(hidden: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """What FlopCounterMode, which sees the operation as one, is told."""
    return 4 * hidden[0] * hidden[1] * weight[0]


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    fp32_logits: bool = False,
    grad_scale: float = 1.0,
    logits_budget_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted entropy of a frozen head's output and its gradient at the head's input.

    loss = Σ_t row_weight_t · H(softmax(hidden_t · weightᵀ + bias)), the criterion of HFPrune (arXiv
    2603.08083); call `hidden.backward(d_hidden)` to go on below the head.

    Args:
        hidden: (T, D) fp32, bf16, fp16 or fp64, the input of the head.
        weight: (V, D), same dtype.
        row_weight: (T,) weight of each row in the loss, by default 1/T. For sequences of unequal
            length, 1 / length in each row of a sequence; 0 in rows of padding, which then count for
            nothing, whatever they hold.
        bias: (V,), same dtype, or None.
        softcap, logit_scale: as in `softmax_entropy`, applied after the bias.
        fp32_logits: keep the logits of a bf16 or fp16 head in fp32. On a GPU their gradient is
            rounded to the head's dtype for the second product; on a CPU nothing is.
        grad_scale: power of two by which d_hidden is multiplied (for fp16, so that small gradients
            survive). fp16's dz is finite while |row_weight| · logit_scale · max(grad_scale, 4096)
            is below 16384; d_hidden must fit as well.
        logits_budget_bytes: limit of the logits buffer and what else a chunk of rows needs (one
            row at least). By default 256 MiB, or 512 rows if that is more.
        backend: "triton" or "torch"; by default what HFPRUNE_BACKEND says, else triton on a GPU and
            torch elsewhere and for fp64.

    Returns:
        loss: scalar in nats, fp32 (fp64 for fp64 input); summed in fp64.
        d_hidden: (T, D), same dtype as hidden: grad_scale · dloss/dhidden.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    4·T·D·V FLOPs; extra memory is the budget, d_hidden and a few numbers a row (and on the torch
    path up to 10 MiB of temporaries, 20 for fp64). On a GPU, per logit in bf16: 2 bytes written and
    2 read by the products, 4 to 6 by the pass. Nothing waits for the device.
    """
    if row_weight is None:
        row_weight = hidden.new_full(hidden.shape[:1], 1 / max(1, len(hidden)), dtype=torch.float64)
    if bias is not None:
        bias = bias.detach()
    return _linear_entropy(
        hidden.detach(), weight.detach(), row_weight.detach(), bias,
        softcap, logit_scale, fp32_logits, grad_scale, logits_budget_bytes, backend,
    )  # fmt: skip


def _check(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    logits_budget_bytes: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (T, D) and weight (V, D), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            "hidden and weight must share a floating-point dtype, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if row_weight.shape != hidden.shape[:1]:
        raise ValueError(f"row_weight must be ({len(hidden)},), got {tuple(row_weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias must be ({len(weight)},) {weight.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    if logits_budget_bytes is not None and logits_budget_bytes < 1:
        raise ValueError(f"logits_budget_bytes must be at least 1, got {logits_budget_bytes}")
    check_devices(hidden, weight=weight, row_weight=row_weight, bias=bias)
