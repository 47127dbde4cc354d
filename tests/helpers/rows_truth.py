"""Criteria of rows of logits and their gradients in float64, and how far rounding may move them.

The bounds follow the equations of kernels/entropy.py and hold for any order of summation; eps is
that of the dtype computed in, u = eps / 2 the error of one rounding. design.md, section 8, also
allows twice the error of plain torch, which nothing here needs.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP16_SCALE = 4096  # what an fp16 head's dz carries at least, by the docs


@dataclass(frozen=True)
class Rows:
    value: Tensor  # (T,) in nats
    grad: Tensor  # (T, V) dvalue/dlogits
    value_bound: Tensor  # (T,) on the error of the value
    grad_bound: Tensor  # (T, V) on that of the gradient, before it is rounded to be stored
    underflow: float  # comes to that whatever the gradient is multiplied by


@dataclass(frozen=True)
class Softmax:
    """softmax of transformed logits in float64, and the errors of one that is made in eps."""

    z: Tensor  # (T, V) the transformed logits
    slope: Tensor  # (T, V) dz/dlogits / logit_scale
    slope_error: float
    log_p: Tensor  # (T, V) -inf where masked
    p: Tensor  # (T, V)
    eps: float
    move: Tensor  # (T,) how far rounding moves z_i - max
    sums: float  # relative error of a sum over the row
    share: Tensor  # (T, 1) relative error of p
    underflow: float


def softmax_truth(
    logits: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Softmax:  # fmt: skip
    """Truth of softmax(z / temperature); -inf is a masked entry, and may fill a row."""
    info = torch.finfo(torch.promote_types(logits.dtype, torch.float32))
    eps, vocab = info.eps, logits.shape[1]
    z = logits.double() * logit_scale
    slope, slope_error = torch.ones_like(z), 0.0
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, slope = torch.where(z == -torch.inf, z, softcap * tanh), 1 - tanh**2
        slope_error = 12 * eps  # of 1 - (z / softcap)²
    z = z / temperature
    log_p = torch.log_softmax(z, dim=-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    # How far rounding moves z_i - max, with what may be read as such a move. The scale: u L; the
    # difference, at most 2 L: 2 u L; the steps by which a running maximum rises, 2 L in all: 2 u L.
    # A GPU's exp first multiplies by log2 e: 2 u L. exp is right to 3 ulp = 6 u; each block of 4096
    # logits rescales the sums before it by another exp and two products, and so does the merge of
    # a row's lanes. softcap · tanh(x) is off
    # by 22 u of itself: where it is worst, x = 1/4, e = exp(-2x) = 0.61 is off by 8 u, 1 - e by
    # 14 u, 1 + e by 4 u, and x, the quotient and the product by one or two.
    largest = z.masked_fill(z == -torch.inf, 0).abs().amax(dim=1)
    blocks = -(-vocab // 4096) + 1
    move = eps * (4 * largest + (11 * largest if softcap else 0) + 3 + 4 * blocks)
    # Sums of V terms, in any order: λ √V u, λ = 4 for all practical purposes (Higham, Mary 2019).
    sums = 2 * eps * vocab**0.5
    # p: its own move, that of s, the sum s and four roundings.
    share = 2 * move[:, None] + sums + 4 * eps
    # exp, and its product with a factor, underflow to a multiple of the least positive number, and
    # are then multiplied by |w| < 1024.
    underflow = 1024 * info.smallest_normal * info.eps
    return Softmax(
        z, slope / temperature, slope_error, log_p, log_p.exp(), eps, move, sums, share, underflow
    )


def rows_truth(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Rows:
    """Truth of the entropy, or of -log p of labels that are entries or -100, for logits (T, V).

    -inf is a masked entry, and may fill a row.
    """
    made = softmax_truth(logits, softcap=softcap, logit_scale=logit_scale)
    z, log_p, p, eps, move, sums = made.z, made.log_p, made.p, made.eps, made.move, made.sums
    if labels is None:
        surprise = torch.where(p > 0, -log_p, 0.0)
        value = (p * surprise).sum(dim=-1)
        w = torch.where(p > 0, surprise - value[:, None], 0.0)  # dH/dz = p w
        dz = p * w
        # H = log s - u/s. Moves of z: Σ p |w| move <= 2 H move. Sums: s to `sums`, u to `sums` of
        # Σ p |z - max| <= H, twice. A log, a quotient, a difference. A tenth for second order.
        bound = 1.1 * (2 * value * move + sums * (1 + 2 * value) + eps * (1 + value))
        # w = u/s - d: moves of d and of log s, and the errors of s and H.
        dz_bound = dz.abs() * (made.share + made.slope_error)
        dz_bound = dz_bound + p * (2 * move + sums + bound)[:, None]
    else:
        is_label = torch.arange(z.shape[1], device=z.device) == labels[:, None]
        counts = labels != -100
        value = torch.where(counts, -log_p.masked_fill(~is_label, 0).sum(1), 0.0)
        dz = (p - is_label.double()) * (counts[:, None] & (z > -torch.inf))
        # log s moves as a mean of the z do, and by the sum's own error; a log and a difference.
        bound = 1.1 * (2 * move + sums + 2 * eps * (1 + value.nan_to_num(posinf=0.0)))
        dz_bound = p * made.share + 4 * eps * is_label  # and p_y - 1 by four roundings
    return _rows(made, value, bound, dz, dz_bound, logit_scale)


def self_distillation_truth(
    logits: Tensor, labels: Tensor, alpha: float, temperature: float, **transform: Any
) -> Rows:
    """Truth of (1 - alpha) · -log p of labels + alpha · KL(r ‖ p), r = softmax(z / temperature)."""
    labelled = rows_truth(logits, labels, **transform)
    made = softmax_truth(logits, **transform)
    teacher = softmax_truth(logits, temperature=temperature, **transform)
    p, r, eps, counts = made.p, teacher.p, made.eps, labels != -100
    log_ratio = torch.where(r > 0, teacher.log_p - made.log_p, 0.0)
    kl = (r * log_ratio).sum(dim=-1)
    is_label = torch.arange(p.shape[1], device=p.device) == labels[:, None]
    dz = p - (1 - alpha) * is_label.double() - alpha * r
    # log s - log s' + (1/τ - 1) u'/s', u' = Σ r d. The two logs move as means of the z do, and by
    # the sums' own errors; u'/s' by the errors of r, d and both sums, of which d is as large as
    # size; d / τ is rounded once more. Then logs of numbers up to V, a product and two sums.
    d = torch.where(made.z > -torch.inf, made.z - made.z.amax(dim=1, keepdim=True), 0.0)
    size, sharper = (r * d.abs()).sum(dim=-1), abs(1 / temperature - 1)
    move, move_r = made.move, 1.5 * teacher.move
    bound = move + move_r + 2 * made.sums + sharper * (move + size * (2 * move_r + 2 * made.sums))
    bound = 1.1 * (bound + 4 * eps * (2 * math.log(p.shape[1]) + 1 + sharper * size))
    dz_bound = p * made.share + 1.5 * alpha * r * teacher.share + 4 * eps * (is_label + dz.abs())
    value = torch.where(counts, (1 - alpha) * labelled.value + alpha * kl, 0.0)
    value_bound = (1 - alpha) * labelled.value_bound + alpha * bound + 2 * eps * kl
    dz = dz * (counts[:, None] & (made.z > -torch.inf))
    logit_scale = transform.get("logit_scale", 1.0)
    return _rows(made, value, value_bound, dz, dz_bound, logit_scale)


def kl_truth(
    logits: Tensor, teacher_logits: Tensor, *, softcap: float | None = None,
    teacher_softcap: float | None = None, logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0, temperature: float = 1.0,
) -> Rows:  # fmt: skip
    """Truth of KL(p ‖ q), q = softmax(z / temperature) of the logits and p that of the teacher's.

    inf where p > 0 and z = -inf; 0, also the gradient, where the teacher's row is -inf throughout.
    """
    student = softmax_truth(
        logits, softcap=softcap, logit_scale=logit_scale, temperature=temperature
    )
    # Its maths is of the student's dtype.
    teacher = softmax_truth(
        teacher_logits, softcap=teacher_softcap, logit_scale=teacher_logit_scale,
        temperature=temperature,
    )  # fmt: skip
    p, q, eps = teacher.p, student.p, student.eps
    log_ratio = torch.where(p > 0, teacher.log_p - student.log_p, 0.0)
    value = (p * log_ratio).sum(dim=-1)
    dz = (q - p) * ((student.z > -torch.inf) & (p.sum(dim=-1, keepdim=True) > 0))
    # The terms p (log p - log q) + q - p: p and q by their shares; log p - log q by the moves of
    # both and of both sums, the two sums, a quotient, a log, and two roundings of numbers of at
    # most the sum of both moves; the sum of the terms.
    size = (p * log_ratio.abs()).nan_to_num(posinf=0.0).sum(dim=-1)
    bound = teacher.share[:, 0] * (1 + size) + student.share[:, 0]
    bound = bound + 3 * (student.move + teacher.move) + 2 * student.sums + 2 * eps
    bound = 1.1 * (bound + student.sums * (size + 2))
    dz_bound = q * student.share + p * teacher.share + 4 * eps * dz.abs()
    return _rows(student, value, bound, dz, dz_bound, logit_scale)


def _rows(
    made: Softmax, value: Tensor, bound: Tensor, dz: Tensor, dz_bound: Tensor, logit_scale: float
) -> Rows:
    """The value and dvalue/dz of rows, with their errors, after the transform of the logits."""
    grad_bound = (made.slope + made.slope_error) * dz_bound + made.slope_error * dz.abs()
    return Rows(
        value, logit_scale * made.slope * dz, bound,
        logit_scale * (1.1 * grad_bound + made.underflow), made.underflow,
    )  # fmt: skip


def stored(exact: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Bound on the error of rounding `exact` to dtype: half an ulp, also among the subnormals.

    Triton's interpreter truncates where it stores bfloat16, and garbles the subnormals: an ulp, or
    the smallest normal number.
    """
    info = torch.finfo(dtype)
    if backend == "triton" and dtype == torch.bfloat16:
        return info.eps * exact.abs() + info.smallest_normal
    return 0.5 * info.eps * (exact.abs() + info.smallest_normal)


def assert_rows(
    values: Tensor, grad: Tensor, truth: Rows, backend: str, row_scale: Tensor | None = None,
    flushed: float = 0.0,
) -> None:  # fmt: skip
    """Values and gradients, these times row_scale, are within the bounds; inf where truth is.

    flushed: the least number that is not taken for 0.
    """
    share = 2 if grad.dtype == torch.float64 else 1  # the truth is rounded as well
    infinite = truth.value == torch.inf
    assert (values[infinite] == torch.inf).all()
    assert ((values - truth.value)[~infinite].abs() <= share * truth.value_bound[~infinite]).all()
    scale = torch.ones_like(truth.value) if row_scale is None else row_scale
    exact = scale.double()[:, None] * truth.grad
    bound = scale.double().abs()[:, None] * truth.grad_bound + truth.underflow
    bound = bound + stored(exact.abs() + bound, grad.dtype, backend) + flushed
    assert ((grad - exact).abs() <= share * bound).all()


def in_lanes(vocab: int) -> Tensor:
    """The entries in the order of the draw: 8 neighbours of every 4096, then the next 8 of each."""
    groups = (start for first in range(0, 4096, 8) for start in range(first, vocab, 4096))
    return torch.tensor([i for start in groups for i in range(start, min(start + 8, vocab))])


def assert_drawn(y: Tensor, logits: Tensor, number: Tensor, **transform: Any) -> None:
    """The distribution in the order of the draw rises past the row's number at y.

    Rounding may move either edge: p_y and the sums up to it by their shares, which are relative,
    and the target by that of s.
    """
    made, order = softmax_truth(logits, **transform), in_lanes(logits.shape[1]).to(logits.device)
    up_to = made.p[:, order].cumsum(dim=1)
    nth = (order == y[:, None]).int().argmax(dim=1, keepdim=True)
    p_y, edge, u = made.p.gather(1, y[:, None]), up_to.gather(1, nth), number.double()[:, None]
    assert (p_y > 0).all()
    assert (edge - p_y <= u + 2.2 * made.share).all()
    assert (u <= edge + 2.2 * made.share).all()


def assert_head(
    operation: Any, hidden: Tensor, weight: Tensor, row_weight: Tensor, backend: str, *,
    labels: Tensor | None = None, bias: Tensor | None = None, fp32_logits: bool = False,
    grad_scale: float = 1.0, logits_budget_bytes: int | None = None, **transform: Any,
) -> None:  # fmt: skip
    """For dyadic inputs: the errors of loss and d_hidden stay within the bounds on rounding."""
    found = operation(
        hidden, weight, *([] if labels is None else [labels]), row_weight, bias=bias,
        fp32_logits=fp32_logits, grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes,
        backend=backend, **transform,
    )  # fmt: skip
    rows = rows_truth(exact_logits(hidden, weight, bias), labels, **transform)
    assert_loss_and_grad(*found, rows, weight, row_weight, backend, fp32_logits, grad_scale)


def exact_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The logits of dyadic inputs, which every dtype holds."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    return logits.to(hidden.dtype)


def assert_loss_and_grad(
    loss: Tensor, d_hidden: Tensor, rows: Rows, weight: Tensor, row_weight: Tensor, backend: str,
    fp32_logits: bool, grad_scale: float,
) -> None:  # fmt: skip
    """Loss and d_hidden of a head whose rows of logits are exact are within the bounds."""
    dtype, wide = d_hidden.dtype, weight.double()
    share = 2 if dtype == torch.float64 else 1  # the truth is rounded as well
    # The weights, the sum of the terms and the loss are each rounded once.
    eps = torch.finfo(loss.dtype).eps
    bound = (row_weight * (rows.value_bound + 2 * eps * rows.value)).sum()
    assert (loss - (row_weight * rows.value).sum()).abs() <= share * bound
    # dz is rounded to the dtype of the head unless the logits are fp32, in fp16 after it is scaled;
    # then V products are added in fp32, in any order, and the sum is rounded.
    scale = max(grad_scale, FP16_SCALE) if dtype == torch.float16 and not fp32_logits else 1
    kept = torch.promote_types(dtype, torch.float32) if fp32_logits else dtype
    dz = row_weight[:, None] * rows.grad
    dz_bound = row_weight[:, None] * rows.grad_bound + rows.underflow
    dz_bound += stored(scale * (dz.abs() + dz_bound), kept, backend) / scale
    truth = dz @ wide
    bound = (dz_bound + 2 * eps * len(weight) ** 0.5 * dz.abs()) @ wide.abs()
    bound += stored(grad_scale * (truth.abs() + bound), dtype, "torch") / grad_scale
    assert ((d_hidden.double() / grad_scale - truth).abs() <= share * bound).all()
