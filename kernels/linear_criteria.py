"""Weighted cross entropy of a language-model head, of given or sampled labels, and its gradient.

    z_t = hidden_t · weightᵀ + bias        loss = Σ_t row_weight_t · -log softmax(z_t)[y_t]

with y_t a label, or drawn from softmax(z_t); or with a divergence from the row's own sharper
softmax mixed in. The equations are in `_criterion.py`, the passage over chunks of rows in
`_linear.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._criterion import Criterion
from hfprune_fast.kernels._linear import linear_criterion
from hfprune_fast.kernels._loss import HeadLoss


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
        labels: (T,) int64, for example the next tokens; -100 (torch's ignore_index) in rows
            without one, which then add nothing, even if they hold NaN.
        hidden, weight, row_weight: as in `linear_entropy`. The default of 1/T counts rows without a
            label as well.
        bias, softcap, logit_scale, fp32_logits, grad_scale, logits_budget_bytes, backend: as in
            `linear_entropy`. fp16's dz is finite up to four times the product named there.

    Returns:
        loss, d_hidden: as in `linear_entropy`. The loss is inf if the logit of a label is -inf; a
            logit of -inf adds nothing to d_hidden.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run. A label
            outside the vocabulary raises on a CPU; on a GPU, where the check would synchronise,
            its row and so the loss are NaN.

    Work, traffic and memory as in `linear_entropy`, plus one label a row.
    """
    loss, d_hidden, *_ = linear_criterion(
        hidden, weight, row_weight, bias, Criterion("cross_entropy", labels),
        softcap=softcap, logit_scale=logit_scale, fp32_logits=fp32_logits,
        grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes, backend=backend,
    )  # fmt: skip
    return loss, d_hidden


def linear_cross_entropy_loss(
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
) -> Tensor:
    """Return the loss of `linear_cross_entropy`, differentiable once in hidden, weight and bias.

    The gradients are made in the forward pass and kept, as `linear_kl_loss` does.

    Args:
        grad_scale: as in `linear_kl_loss`.
        others: as in `linear_cross_entropy`.

    Raises:
        ValueError: as `linear_cross_entropy`.
        RuntimeError: a second derivative is requested.
    """

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grads: bool
    ) -> tuple[Tensor, ...]:
        return linear_criterion(
            hidden, weight, row_weight, bias, Criterion("cross_entropy", labels),
            softcap=softcap, logit_scale=logit_scale, fp32_logits=fp32_logits,
            grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes, backend=backend,
            weight_grads=weight_grads,
        )  # fmt: skip

    return HeadLoss.of(run, grad_scale, hidden, weight, bias)


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
    """Return the weighted cross entropy of labels sampled from the model, and its gradient.

    loss = Σ_t row_weight_t · -log p_t[y_t], with y_t drawn from p_t = softmax(hidden_t · weightᵀ +
    bias). The mean of the outer products of such gradients is the Fisher information of the model.

    Args:
        row_id: (T,) int64. The sample of a row depends on its logits, its id and the seed alone: an
            id per token of a data set, such as sequence · 2^20 + position, makes it the same in
            any micro-batch or chunk. Rows of equal id are not independent.
        seed: 0 .. 2^63 - 1.
        hidden, weight, row_weight, bias, softcap, logit_scale, fp32_logits, grad_scale,
            logits_budget_bytes, backend: as in `linear_cross_entropy`.

    Returns:
        loss, d_hidden: as in `linear_entropy`. All backends draw with the same uniform numbers
            (`_philox.py`); samples differ only where rounding decides between two entries. An
            entry of p = 0 is never drawn; a row that is -inf throughout adds 0.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    Work and memory as in `linear_entropy`, plus one temporary on the torch path. On a GPU 8192
    logits a row are read once more.
    """
    loss, d_hidden, *_ = linear_criterion(
        hidden, weight, row_weight, bias, Criterion("fisher", row_id, seed),
        softcap=softcap, logit_scale=logit_scale, fp32_logits=fp32_logits,
        grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes, backend=backend,
    )  # fmt: skip
    return loss, d_hidden


def linear_self_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_weight: Tensor | None = None,
    *,
    alpha: float = 0.4,
    temperature: float = 0.5,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    fp32_logits: bool = False,
    grad_scale: float = 1.0,
    logits_budget_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cross entropy mixed with a divergence from the model's own output, and its gradient.

    loss = Σ_t row_weight_t · ((1-α) · -log p_t[label_t] + α · KL(softmax(z_t / τ) ‖ p_t)), p_t =
    softmax(z_t), z_t the logits. It is the loss of SDMPrune at the model that is its own teacher:
    softmax(z_t / τ) is held fixed, and dloss/dz_ti = row_weight_t · (p_ti - (1-α) [i = label_t] -
    α softmax(z_t / τ)_i), from one row and without a second model.

    Args:
        alpha: α, at least 0 and below 1; about 0.4 in SDMPrune.
        temperature: τ; 0.2 to 0.5 in SDMPrune. With 1 the divergence is 0, and so is its gradient.
        hidden, weight, labels, row_weight, bias, softcap, logit_scale, fp32_logits, grad_scale,
            logits_budget_bytes, backend: as in `linear_cross_entropy`.

    Returns:
        loss, d_hidden: as in `linear_cross_entropy`; a row without a label adds no divergence.

    Raises:
        ValueError: as `linear_cross_entropy`, or alpha or temperature outside their ranges.

    Work, traffic and memory as in `linear_cross_entropy`; one more exp a logit in each pass.
    """
    loss, d_hidden, *_ = linear_criterion(
        hidden, weight, row_weight, bias,
        Criterion("self_distillation", labels, alpha=alpha, temperature=temperature),
        softcap=softcap, logit_scale=logit_scale, fp32_logits=fp32_logits,
        grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes, backend=backend,
    )  # fmt: skip
    return loss, d_hidden
