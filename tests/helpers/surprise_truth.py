"""-log p_y of rows of logits and its gradient in float64, and how far rounding may move them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surprise:
    value: Tensor  # (T,) in nats
    grad: Tensor  # (T, V)
    value_bound: Tensor  # (T,)
    grad_bound: Tensor  # (T, V), before the gradient is rounded to be stored
    cdf: Tensor  # (T, V) Σ_{k <= i} p_k
    cdf_bound: Tensor  # (T, 1)


def surprise_truth(
    logits: Tensor, labels: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0
) -> Surprise:
    """Truth for labels that are entries or -100; eps is that of the dtype computed in."""
    eps = torch.finfo(torch.promote_types(logits.dtype, torch.float32)).eps
    z = logits.double() * logit_scale
    slope = torch.ones_like(z)
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, slope = torch.where(z == -torch.inf, z, softcap * tanh), 1 - tanh**2
    shifted = z - z.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)
    p = shifted.exp() / shifted.exp().sum(dim=1, keepdim=True).clamp(min=1)
    is_label = torch.arange(z.shape[1]) == labels[:, None]
    value = shifted.exp().sum(dim=1).clamp(min=1).log() - shifted.masked_fill(~is_label, 0).sum(1)
    value[labels == -100] = 0
    grad = logit_scale * slope * (p - is_label.double())
    grad = grad.masked_fill((z == -torch.inf) | (labels == -100)[:, None], 0)
    # How far rounding moves z_i - max: as in entropy_truth.
    largest = z.masked_fill(z == -torch.inf, 0).abs().amax(dim=1)
    blocks = -(-z.shape[1] // 8192)
    move = eps * (3 * largest + (11 * largest if softcap else 0) + 3 + 4 * blocks)
    sums = 2 * eps * z.shape[1] ** 0.5
    # log s moves as a mean of the z do, and by the sum's own error; a log and a difference.
    value_bound = 1.1 * (2 * move + sums + 2 * eps * (1 + value.nan_to_num(posinf=0.0)))
    # p, by its own move and that of s, the sum and four roundings; of p_y - 1 the same four.
    share = 2 * move[:, None] + sums + 4 * eps
    grad_bound = logit_scale * slope * (p * share + 4 * eps * is_label)
    if softcap is not None:
        grad_bound = grad_bound + 12 * eps * logit_scale * (p - is_label.double()).abs()
    tiny = 1024 * torch.finfo(torch.float32).smallest_normal * eps  # what exp may lose
    # The sum up to an entry, and the total times the uniform number.
    return Surprise(
        value, grad, value_bound, 1.1 * grad_bound + tiny, p.cumsum(dim=1), 1.1 * (2 * share)
    )
