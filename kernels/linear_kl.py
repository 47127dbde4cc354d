"""Weighted KL divergence of a language-model head's output from a teacher's, and its gradient.

    z_t = hidden_t · weightᵀ + bias                   the student's logits
    y_t = teacher_hidden_t · teacher_weightᵀ + teacher_bias
    q_t = softmax(z_t / τ), p_t = softmax(y_t / τ)

    KL_t = Σ_i p_i (log p_i - log q_i)    dKL_t/dz_ti = (q_ti - p_ti) / τ
    loss = Σ_t row_weight_t · KL_t

in nats (Hinton, Vinyals, Dean: "Distilling the knowledge in a neural network", 2015; without their
factor τ², as in TRL's and Liger's losses). The sum that is made is Σ p (log p - log q) - p + q: the
two ends add to 0, no term is below 0, and errors of the normalisers cancel to first order, so that
a small divergence keeps its digits. A family's transform of the logits, softcap ·
tanh(logit_scale · z / softcap), comes before the temperature; the gradient is with respect to the
logits before both. An entry of p = 0 adds nothing; where p > 0 and z = -inf the row's value is inf;
z = -inf has no gradient. A teacher's row that is -inf throughout has value and gradient 0.

Reverse KL and the generalised JSD are not made: their gradient at an entry needs the row's
divergence first, for JSD a third read of both rows, and reverse KL's is infinite where p = 0.

The passage over chunks of rows is in `_linear.py`: the two logits of a chunk are in two reused
buffers, and the gradient overwrites the student's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hfprune_fast.kernels._arguments import (
    check_float64,
    check_grad_scale,
    check_temperature,
    check_transform,
)
from hfprune_fast.kernels._dispatch import resolve_backend
from hfprune_fast.kernels._head import Head
from hfprune_fast.kernels._kl_rows import Transform, kl_rows_and_grad
from hfprune_fast.kernels._linear import (
    check_head,
    check_rows,
    fake_loss_and_grads,
    loss_and_grads,
    row_weight_or_mean,
)
from hfprune_fast.kernels._loss import HeadLoss
from hfprune_fast.kernels._operation import operation


def linear_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (loss, dloss/dhidden) through autograd, with both (T, V) logits whole."""

    def log_softmax(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
        z = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z / temperature, dim=-1)

    linear = torch.nn.functional.linear
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        log_q = log_softmax(linear(hidden, weight, bias), softcap, logit_scale)
        teacher_logits = linear(teacher_hidden, teacher_weight, teacher_bias)
        log_p = log_softmax(teacher_logits, teacher_softcap, teacher_logit_scale)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
        loss = (kl.sum(dim=-1) * row_weight).sum()
        (d_hidden,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), d_hidden


@operation("linear_kl")
def _linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    logit_scale: float,
    teacher_logit_scale: float,
    temperature: float,
    fp32_logits: bool,
    grad_scale: float,
    logits_budget_bytes: int | None,
    weight_grads: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, d_hidden, d_weight, d_bias), a chunk of rows at a time."""
    check_head(hidden, weight, bias)
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_", hidden)
    check_rows(hidden, row_weight, logits_budget_bytes)
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight)
    check_transform(softcap, logit_scale)
    check_transform(teacher_softcap, teacher_logit_scale, "teacher_")
    check_temperature(temperature)
    check_grad_scale(grad_scale)
    resolved = resolve_backend(backend, hidden)
    resolve_backend(resolved, teacher_hidden)
    transform = _divided(softcap, logit_scale, temperature)
    teacher_transform = _divided(teacher_softcap, teacher_logit_scale, temperature)

    def row_pass(rows: slice, logits: list[Tensor], row_scale: Tensor, grad: Tensor) -> Tensor:
        student, teacher = logits
        return kl_rows_and_grad(
            student, teacher, row_scale, grad, transform, teacher_transform, resolved
        )

    return loss_and_grads(
        [Head(hidden, weight, bias), Head(teacher_hidden, teacher_weight, teacher_bias)],
        row_weight, row_pass, fp32_logits=fp32_logits,
        grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes,
        weight_grads=weight_grads, backend=resolved,
    )  # fmt: skip


def _divided(softcap: float | None, logit_scale: float, temperature: float) -> Transform:
    """Return the softcap and scale of z / temperature."""
    return None if softcap is None else softcap / temperature, logit_scale / temperature


@_linear_kl.register_fake
def _(hidden, weight, teacher_hidden, teacher_weight, row_weight, bias, *options):
    return fake_loss_and_grads(hidden, weight, bias, options[-2])


@register_flop_formula(torch.ops.hfprune_fast.linear_kl)
def _flops(
    hidden: torch.Size, weight: torch.Size, teacher_hidden: torch.Size, *options: Any, **__: object
) -> int:
    """Return the FLOPs of the operation, which FlopCounterMode cannot look into."""
    weight_grads: bool = options[-2]
    student = (4 + 2 * weight_grads) * hidden[1]
    return (student + 2 * teacher_hidden[1]) * hidden[0] * weight[0]


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float = 1.0,
    fp32_logits: bool = False,
    grad_scale: float = 1.0,
    logits_budget_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted KL divergence from a teacher and its gradient at a frozen head's input.

    loss = Σ_t row_weight_t · KL(softmax(y_t / τ) ‖ softmax(z_t / τ)), z the student's logits and y
    the teacher's; multiply row_weight by τ² for the loss of Hinton and others (2015).

    Args:
        hidden, weight, bias: of the student, as in `linear_entropy`.
        teacher_hidden: (T, E), the input of the teacher's head; E and the dtype may be others than
            the student's.
        teacher_weight, teacher_bias: (V, E) and (V,) or None, the dtype of teacher_hidden.
        row_weight: as in `linear_entropy`: by default 1/T, the mean; 0 in rows of padding.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale: as in `linear_entropy`, of each.
        temperature: τ, which divides the logits of both.
        fp32_logits, grad_scale, logits_budget_bytes, backend: as in `linear_entropy`; the budget is
            that of both logits together. fp16's dz is finite up to four times the product named
            there, over τ.

    Returns:
        loss: scalar in nats, fp32 (fp64 for fp64 input); summed in fp64. inf if a row of weight
            other than 0 has an entry that the teacher allows and the student masks by -inf.
        d_hidden: (T, D), same dtype as hidden: grad_scale · dloss/dhidden.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    4·T·D·V + 2·T·E·V FLOPs; extra memory as in `linear_entropy`. On a GPU, per entry of the
    vocabulary in bf16: 4 bytes written and 2 read by the products, 6 to 10 by the pass. No host
    synchronisation.
    """
    found = _linear_kl(
        hidden, weight, teacher_hidden, teacher_weight, row_weight_or_mean(hidden, row_weight),
        bias, teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale,
        temperature, fp32_logits, grad_scale, logits_budget_bytes, False, backend,
    )  # fmt: skip
    return found[0], found[1]


def linear_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    temperature: float = 1.0,
    fp32_logits: bool = False,
    grad_scale: float = 1.0,
    logits_budget_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the loss of `linear_kl`, differentiable once in hidden, weight and bias.

    The gradients are made in the forward pass, while the logits are there, and kept: (T, D) for a
    frozen head. If weight or bias requires a gradient also (V, D), which is summed over the chunks
    in fp32 and rounded once to the dtype of the weight, for another 2·T·D·V FLOPs. There is no
    gradient of row_weight or of the teacher.

    Args:
        grad_scale: what the kept gradients carry, so that those of fp16 do not underflow; the
            backward pass takes it out again.
        others: as in `linear_kl`.

    Raises:
        ValueError: as `linear_kl`.
        RuntimeError: a second derivative is requested.
    """
    row_weight = row_weight_or_mean(hidden, row_weight)

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grads: bool
    ) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _linear_kl(
            hidden, weight, teacher_hidden, teacher_weight, row_weight,
            bias, teacher_bias, softcap, teacher_softcap, logit_scale, teacher_logit_scale,
            temperature, fp32_logits, grad_scale, logits_budget_bytes, weight_grads, backend,
        )  # fmt: skip
        return found

    return HeadLoss.of(run, grad_scale, hidden, weight, bias)


def _check_teacher(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    if len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"teacher_hidden must have the {len(hidden)} rows of hidden, got {len(teacher_hidden)}"
        )
    if len(teacher_weight) != len(weight):
        raise ValueError(
            f"teacher_weight must have the {len(weight)} entries of weight, "
            f"got {len(teacher_weight)}: both models must have one vocabulary"
        )
    check_float64(hidden, teacher_hidden, "hidden")
