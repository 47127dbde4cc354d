"""Weighted entropy of a language-model head, or another criterion, and its gradient at the input.

    z_t = hidden_t · weightᵀ + bias        loss = Σ_t row_weight_t · value(z_t)

with value(z) the entropy of softmax(z), or -log p_y for a label y or one that is drawn from p. The
logits are never whole: rows go through one reused buffer, chunk by chunk. A first product makes the
logits of a chunk, one pass turns them into dloss/dz (`_rows.py`, where the equations are) and a
second product makes dloss/dhidden. That is 4·T·D·V FLOPs, against 6 where the logits are made again
for a backward pass. The head is frozen: there is no gradient of weight or bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hfprune_fast.kernels._arguments import check_devices, check_grad_scale, check_transform
from hfprune_fast.kernels._dispatch import resolve_backend, undisturbed
from hfprune_fast.kernels._head import Buffers, onednn_linear, product, product_back
from hfprune_fast.kernels._rows import IGNORED_LABEL, Criterion, judge_rows
from hfprune_fast.kernels.entropy import softmax_entropy_grad_reference

# dz of an fp16 head is at least this many times dloss/dz: at V = 32000 and a row weight of 1/1024
# two thirds of it would be 0 otherwise. |dH/dz| is below 4 for any V up to 300k (most is near one
# peak of p = 1/2), so with weights up to 1 the largest is a quarter of what fp16 holds. That of the
# other criteria is at most 1.
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


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (loss, dloss/dhidden) through autograd, with the (T, V) logits whole."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = torch.nn.functional.linear(hidden, weight, bias)
        z = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        terms = torch.nn.functional.cross_entropy(z, labels, reduction="none")
        loss = (terms * row_weight).sum()
        (d_hidden,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), d_hidden


@torch.library.custom_op("hfprune_fast::linear_criterion", mutates_args=())
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
    _check(hidden, weight, row_weight, bias, logits_budget_bytes)
    check_transform(softcap, logit_scale)
    check_grad_scale(grad_scale)
    _check_keys(hidden, weight, criterion, keys, seed)
    backend = resolve_backend(backend, hidden)
    maths_dtype = torch.promote_types(hidden.dtype, torch.float32)
    values = hidden.new_empty(hidden.shape[0], dtype=maths_dtype)
    d_hidden = torch.empty_like(hidden)
    linear = onednn_linear(hidden, weight) if backend == "torch" else None
    buffers = Buffers.allocate(hidden, weight, fp32_logits, logits_budget_bytes, linear is None)
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
                product(hidden[rows], weight, bias, logits, buffers.tile)
            values[rows] = judge_rows(
                logits, row_scale[rows], d_logits,
                Criterion(criterion, None if keys is None else keys[rows], seed),
                softcap=softcap, logit_scale=logit_scale, backend=backend,
            )  # fmt: skip
            if linear is not None:
                d_hidden[rows] = linear(d_logits, weight.t(), None)
            else:
                factor = grad_scale / dz_scale
                product_back(d_logits, weight, d_hidden[rows], factor, buffers.tile)
            del logits, d_logits  # which may be a chunk's own, before the next one's are made
    # Not 0 · NaN where a row of padding has weight 0.
    terms = torch.where(row_weight == 0, 0, values.double() * row_weight)
    return terms.sum().to(maths_dtype), d_hidden


@_linear_criterion.register_fake
def _(hidden, *_):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(hidden)


@register_flop_formula(torch.ops.hfprune_fast.linear_criterion)
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
    return _run(
        hidden, weight, row_weight, bias, "entropy", None, 0,
        softcap, logit_scale, fp32_logits, grad_scale, logits_budget_bytes, backend,
    )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
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
    """Return the weighted cross entropy of labels and its gradient at a frozen head's input.

    loss = Σ_t row_weight_t · -log p_t[label_t], p_t = softmax(hidden_t · weightᵀ + bias).

    Args:
        labels: (T,) int64, for example the next tokens; -100 (torch's ignore_index) in rows that
            have none, which then count for nothing, whatever they hold.
        hidden, weight, row_weight: as in `linear_entropy`. The default of 1/T counts rows without a
            label as well.
        bias, softcap, logit_scale, fp32_logits, grad_scale, logits_budget_bytes, backend: as in
            `linear_entropy`. fp16's dz is finite up to four times the product that is given there.

    Returns:
        loss, d_hidden: as in `linear_entropy`. The loss is inf where the logit of a label is -inf;
            nothing comes to d_hidden from a logit of -inf.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run. A label
            outside the vocabulary is seen on a CPU; on a GPU, where a look would wait for it, its
            row and so the loss are NaN.

    Work, traffic and memory as in `linear_entropy`, and a label a row.
    """
    return _run(
        hidden, weight, row_weight, bias, "cross_entropy", labels, 0,
        softcap, logit_scale, fp32_logits, grad_scale, logits_budget_bytes, backend,
    )  # fmt: skip


def linear_fisher(
    hidden: Tensor,
    weight: Tensor,
    row_id: Tensor,
    row_weight: Tensor | None = None,
    *,
    seed: int = 0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    fp32_logits: bool = False,
    grad_scale: float = 1.0,
    logits_budget_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted cross entropy of labels that the model draws itself, and its gradient.

    loss = Σ_t row_weight_t · -log p_t[y_t], with y_t drawn from p_t = softmax(hidden_t · weightᵀ +
    bias). The mean of the outer products of such gradients is the Fisher information of the model.

    Args:
        row_id: (T,) int64. The sample of a row depends on its logits, its id and the seed alone: an
            id for each token of a data set, such as sequence · 2^20 + position, makes it the same
            in any micro-batch or chunk. Rows of equal id are not independent.
        seed: 0 .. 2^63 - 1.
        hidden, weight, row_weight, bias, softcap, logit_scale, fp32_logits, grad_scale,
            logits_budget_bytes, backend: as in `linear_cross_entropy`.

    Returns:
        loss, d_hidden: as in `linear_entropy`. Both backends draw by the same numbers (`_philox`);
            samples differ only where rounding decides between two entries. An entry of p = 0 is
            never drawn; a row of nothing but -inf counts 0.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    Work and memory as in `linear_entropy` (on the torch path one more temporary). On a GPU, beside
    its traffic, 8192 logits a row are read once more.
    """
    return _run(
        hidden, weight, row_weight, bias, "fisher", row_id, seed,
        softcap, logit_scale, fp32_logits, grad_scale, logits_budget_bytes, backend,
    )  # fmt: skip


def _run(
    hidden: Tensor, weight: Tensor, row_weight: Tensor | None, bias: Tensor | None,
    criterion: str, keys: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if row_weight is None:
        row_weight = hidden.new_full(hidden.shape[:1], 1 / max(1, len(hidden)), dtype=torch.float64)
    if bias is not None:
        bias = bias.detach()
    return _linear_criterion(
        hidden.detach(), weight.detach(), row_weight.detach(), bias, criterion, keys, *options
    )


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
