"""The operation that the linear criteria share: a frozen head, chunk by chunk of rows.

    z_t = hidden_t · weightᵀ + bias        loss = Σ_t row_weight_t · value(z_t)

One product makes the logits of a chunk in a reused buffer, one pass turns them into dloss/dz
(`_rows.py`) and a second product makes dloss/dhidden: 4·T·D·V FLOPs, against 6 where a backward
pass makes the logits again. The (T, V) logits never exist as a whole. The gradient of a trained
head, if wanted, is added up chunk by chunk by a third product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hfprune_fast.kernels._arguments import (
    check_devices,
    check_grad_scale,
    check_temperature,
    check_transform,
)
from hfprune_fast.kernels._criterion import IGNORED_LABEL, Criterion
from hfprune_fast.kernels._dispatch import device_guard, resolve_backend
from hfprune_fast.kernels._head import Head, products_of
from hfprune_fast.kernels._operation import operation
from hfprune_fast.kernels._rows import rows_loss_and_grad

# dz of an fp16 head is at least this many times dloss/dz: at V = 32000 and a row weight of 1/1024
# two thirds of it would be 0 otherwise. |dH/dz| is below 4 for any V up to 300k (most is near one
# peak of p = 1/2), so with weights up to 1 the largest is a quarter of what fp16 holds. That of the
# other criteria is at most 1.
_FP16_DZ_SCALE = 4096.0

# The rows of a chunk, each head's logits of them, row_scale, and where the gradient of the first
# head's logits goes, times row_scale; returns the rows' values.
RowPass = Callable[[slice, list[Tensor], Tensor, Tensor], Tensor]


def loss_and_grads(
    heads: Sequence[Head],
    row_weight: Tensor,
    row_pass: RowPass,
    *,
    fp32_logits: bool,
    grad_scale: float,
    logits_budget_bytes: int | None,
    weight_grads: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, d_hidden, d_weight, d_bias) of the first head, a chunk of rows at a time.

    The gradients carry grad_scale. Without weight_grads d_weight is empty, and so is d_bias without
    a bias; they are summed in fp32 or wider, and have the dtype of the weight.
    """
    hidden, weight, bias = heads[0].hidden, heads[0].weight, heads[0].bias
    maths_dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = hidden.new_empty(hidden.shape[0], dtype=maths_dtype)
    d_hidden = torch.empty_like(hidden)
    d_weight, d_bias = (
        hidden.new_zeros(like.shape if weight_grads and like is not None else 0, dtype=maths_dtype)
        for like in (weight, bias)
    )
    chunk, products = products_of(heads, fp32_logits, logits_budget_bytes, backend)
    own, dz_scale = products[0], grad_scale
    if own.d_buffer.dtype == torch.float16:
        dz_scale = max(grad_scale, _FP16_DZ_SCALE)
    row_weight = row_weight.to(maths_dtype)
    row_scale, factor = row_weight * dz_scale, grad_scale / dz_scale
    with device_guard(hidden):
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            logits = [one.logits(rows) for one in products]
            d_logits = own.gradient(logits[0])
            values[rows] = row_pass(rows, logits, row_scale[rows], d_logits)
            del logits  # may be the chunk's own: free them before the next chunk
            own.back(d_logits, d_hidden[rows], factor)
            if weight_grads:
                own.add_d_weight(d_logits, rows, d_weight, d_bias, factor)
            del d_logits
    # Padding has weight 0 and may hold NaN.
    terms = torch.where(row_weight == 0, 0, values.double() * row_weight)
    loss = terms.sum().to(maths_dtype)
    return loss, d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def fake_loss_and_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors like those of `loss_and_grads`."""
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    d_weight, d_bias = (
        weight.new_empty(like.shape if weight_grads and like is not None else 0)
        for like in (weight, bias)
    )
    return loss, torch.empty_like(hidden), d_weight, d_bias


@operation("linear_criterion")
def _linear_criterion(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    criterion: str,
    keys: Tensor | None,
    seed: int,
    alpha: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    fp32_logits: bool,
    grad_scale: float,
    logits_budget_bytes: int | None,
    weight_grads: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, d_hidden, d_weight, d_bias) of any criterion of one row of logits."""
    check_head(hidden, weight, bias)
    check_rows(hidden, row_weight, logits_budget_bytes)
    check_transform(softcap, logit_scale)
    check_grad_scale(grad_scale)
    _check_keys(hidden, weight, criterion, keys, seed)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}")
    check_temperature(temperature)
    resolved = resolve_backend(backend, hidden)

    def row_pass(rows: slice, logits: list[Tensor], row_scale: Tensor, grad: Tensor) -> Tensor:
        own_keys = None if keys is None else keys[rows]
        of_rows = Criterion(criterion, own_keys, seed, alpha, temperature)
        return rows_loss_and_grad(
            logits[0], row_scale, grad, of_rows,
            softcap=softcap, logit_scale=logit_scale, backend=resolved,
        )  # fmt: skip

    return loss_and_grads(
        [Head(hidden, weight, bias)], row_weight, row_pass, fp32_logits=fp32_logits,
        grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes,
        weight_grads=weight_grads, backend=resolved,
    )  # fmt: skip


@_linear_criterion.register_fake
def _(hidden, weight, row_weight, bias, *options):
    return fake_loss_and_grads(hidden, weight, bias, options[-2])


@register_flop_formula(torch.ops.hfprune_fast.linear_criterion)
def _flops(hidden: torch.Size, weight: torch.Size, *options: Any, **__: object) -> int:
    """Return the FLOPs of the operation, which FlopCounterMode cannot look into."""
    weight_grads: bool = options[-2]
    return (4 + 2 * weight_grads) * hidden[0] * hidden[1] * weight[0]


def linear_criterion(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor | None,
    bias: Tensor | None,
    criterion: Criterion,
    *,
    softcap: float | None,
    logit_scale: float,
    fp32_logits: bool,
    grad_scale: float,
    logits_budget_bytes: int | None,
    backend: str | None,
    weight_grads: bool = False,
) -> tuple[Tensor, ...]:
    """Return (loss, d_hidden, d_weight, d_bias) of a criterion; the last two empty if not wanted.

    The other arguments are those of `linear_entropy`.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.
    """
    found: tuple[Tensor, ...] = _linear_criterion(
        hidden, weight, row_weight_or_mean(hidden, row_weight), bias,
        *vars(criterion).values(), softcap, logit_scale, fp32_logits, grad_scale,
        logits_budget_bytes, weight_grads, backend,
    )  # fmt: skip
    return found


def row_weight_or_mean(hidden: Tensor, row_weight: Tensor | None) -> Tensor:
    """Return row_weight, by default 1/T in each row."""
    if row_weight is not None:
        return row_weight
    return hidden.new_full(hidden.shape[:1], 1 / max(1, len(hidden)), dtype=torch.float64)


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, whose: str = "", like: Tensor | None = None
) -> None:
    """Raise ValueError unless the tensors make a head; whose: what their names start with."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{whose}hidden must be (T, D) and {whose}weight (V, D), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{whose}hidden and {whose}weight must share a floating-point dtype, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"{whose}bias must be ({len(weight)},) {weight.dtype}, "
            f"got {tuple(bias.shape)} {bias.dtype}"
        )
    others = {f"{whose}hidden": hidden, f"{whose}weight": weight, f"{whose}bias": bias}
    check_devices(hidden if like is None else like, **others)


def check_rows(hidden: Tensor, row_weight: Tensor, logits_budget_bytes: int | None) -> None:
    """Raise ValueError unless there is a weight for each row, and a budget."""
    if row_weight.shape != hidden.shape[:1]:
        raise ValueError(f"row_weight must be ({len(hidden)},), got {tuple(row_weight.shape)}")
    check_devices(hidden, row_weight=row_weight)
    if logits_budget_bytes is not None and logits_budget_bytes < 1:
        raise ValueError(f"logits_budget_bytes must be at least 1, got {logits_budget_bytes}")


def _check_keys(
    hidden: Tensor, weight: Tensor, criterion: str, keys: Tensor | None, seed: int
) -> None:
    if keys is None:
        return
    name = "row_id" if criterion == "fisher" else "labels"
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
