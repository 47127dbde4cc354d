"""The operation that the linear criteria share: a frozen head, chunk by chunk of rows.

    z_t = hidden_t · weightᵀ + bias        loss = Σ_t row_weight_t · value(z_t)

One product makes the logits of a chunk in a reused buffer, one pass turns them into dloss/dz
(`_rows.py`) and a second product makes dloss/dhidden: 4·T·D·V FLOPs, against 6 where a backward
pass makes the logits again. The (T, V) logits never exist as a whole. There is no gradient of
weight or bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hfprune_fast.kernels._arguments import check_devices, check_grad_scale, check_transform
from hfprune_fast.kernels._criterion import IGNORED_LABEL, Criterion
from hfprune_fast.kernels._dispatch import device_guard, resolve_backend
from hfprune_fast.kernels._head import Buffers, onednn_linear, product, product_back
from hfprune_fast.kernels._operation import operation
from hfprune_fast.kernels._rows import rows_loss_and_grad

# dz of an fp16 head is at least this many times dloss/dz: at V = 32000 and a row weight of 1/1024
# two thirds of it would be 0 otherwise. |dH/dz| is below 4 for any V up to 300k (most is near one
# peak of p = 1/2), so with weights up to 1 the largest is a quarter of what fp16 holds. That of the
# other criteria is at most 1.
_FP16_DZ_SCALE = 4096.0


@operation("linear_criterion")
def _linear_criterion(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    criterion: str,
    keys: Tensor | None,
    seed: int,
    softcap: float | None,
    logit_scale: float,
    fp32_logits: bool,
    grad_scale: float,
    logits_budget_bytes: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, d_hidden) of any criterion, a chunk of rows at a time."""
    _check(hidden, weight, row_weight, bias, logits_budget_bytes)
    check_transform(softcap, logit_scale)
    check_grad_scale(grad_scale)
    _check_keys(hidden, weight, criterion, keys, seed)
    backend = resolve_backend(backend, hidden)
    maths_dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = hidden.new_empty(hidden.shape[0], dtype=maths_dtype)
    d_hidden = torch.empty_like(hidden)
    linear = onednn_linear(hidden, weight) if backend != "triton" else None
    buffers = Buffers.allocate(hidden, weight, fp32_logits, logits_budget_bytes, linear is None)
    dz_scale = grad_scale
    if buffers.d_logits.dtype == torch.float16:
        dz_scale = max(grad_scale, _FP16_DZ_SCALE)
    row_weight = row_weight.to(maths_dtype)
    row_scale = row_weight * dz_scale
    chunk = max(1, buffers.logits.shape[0])
    with device_guard(hidden):
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            if linear is not None:
                logits = d_logits = linear(hidden[rows], weight, bias)
            else:
                logits = buffers.logits[: rows.stop - start]
                d_logits = buffers.d_logits[: rows.stop - start]
                product(hidden[rows], weight, bias, logits, buffers.tile)
            values[rows] = rows_loss_and_grad(
                logits, row_scale[rows], d_logits,
                Criterion(criterion, None if keys is None else keys[rows], seed),
                softcap=softcap, logit_scale=logit_scale, backend=backend,
            )  # fmt: skip
            if linear is not None:
                d_hidden[rows] = linear(d_logits, weight.t(), None)
            else:
                factor = grad_scale / dz_scale
                product_back(d_logits, weight, d_hidden[rows], factor, buffers.tile)
            del logits, d_logits  # may be the chunk's own: free them before the next chunk
    # Padding has weight 0 and may hold NaN.
    terms = torch.where(row_weight == 0, 0, values.double() * row_weight)
    return terms.sum().to(maths_dtype), d_hidden


@_linear_criterion.register_fake
def _(hidden, *_):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(hidden)


@register_flop_formula(torch.ops.hfprune_fast.linear_criterion)
def _flops(hidden: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of the operation, which FlopCounterMode cannot look into."""
    return 4 * hidden[0] * hidden[1] * weight[0]


def linear_criterion(
    hidden: Tensor, weight: Tensor, row_weight: Tensor | None, bias: Tensor | None,
    criterion: str, keys: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (loss, d_hidden) of a criterion; fills in the default row_weight, 1/T.

    options: seed, softcap, logit_scale, fp32_logits, grad_scale, logits_budget_bytes, backend.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.
    """
    if row_weight is None:
        row_weight = hidden.new_full(hidden.shape[:1], 1 / max(1, len(hidden)), dtype=torch.float64)
    return _linear_criterion(hidden, weight, row_weight, bias, criterion, keys, *options)


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


def _check_keys(
    hidden: Tensor, weight: Tensor, criterion: str, keys: Tensor | None, seed: int
) -> None:
    if keys is None:
        return
    name = "labels" if criterion == "cross_entropy" else "row_id"
    if keys.shape != hidden.shape[:1] or keys.dtype != torch.int64:
        raise ValueError(
            f"{name} must be ({len(hidden)},) torch.int64, got {tuple(keys.shape)} {keys.dtype}"
        )
    check_devices(hidden, **{name: keys})
    if seed < 0:
        raise ValueError(f"seed must be in 0 .. 2^63 - 1, got {seed}")
    if name == "labels" and keys.device.type == "cpu":
        wrong = keys[(keys != IGNORED_LABEL) & ((keys < 0) | (keys >= len(weight)))]
        if len(wrong):
            raise ValueError(
                f"labels must be {IGNORED_LABEL} or in 0 .. {len(weight) - 1}, got {int(wrong[0])}"
            )
