"""H(softmax(z)) of rows of logits and its gradient in float64, and how far rounding may move them.

The bounds follow the equations of kernels/entropy.py and hold for any order of summation; eps is
that of the dtype computed in, u = eps / 2 the error of one rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    entropy: Tensor  # (T,) in nats
    grad: Tensor  # (T, V) dH/dlogits
    entropy_bound: Tensor  # (T,) on the error of H
    grad_bound: Tensor  # (T, V) on that of the gradient, before it is rounded to be stored
    underflow: float  # comes to that whatever the gradient is multiplied by


def entropy_truth(
    logits: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0
) -> Rows:
    """Truth for logits (T, V) of any float dtype; -inf is a masked entry, and may fill a row."""
    z = logits.double() * logit_scale
    slope = torch.ones_like(z)
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, slope = torch.where(z == -torch.inf, z, softcap * tanh), 1 - tanh**2
    log_p = torch.log_softmax(z, dim=-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    p = log_p.exp()
    surprise = torch.where(p > 0, -log_p, 0.0)
    entropy = (p * surprise).sum(dim=-1)
    w = torch.where(p > 0, surprise - entropy[:, None], 0.0)  # dH/dz = p w
    info = torch.finfo(torch.promote_types(logits.dtype, torch.float32))
    # exp, and its product with a factor, underflow to a multiple of the least positive number, and
    # are then multiplied by |w| < 1024.
    underflow = 1024 * info.smallest_normal * info.eps
    bounds = _bounds(z, p, w, entropy, slope, softcap, info.eps)
    grad_bound = logit_scale * (bounds[1] + underflow)
    return Rows(entropy, logit_scale * slope * p * w, bounds[0], grad_bound, underflow)


def _bounds(
    z: Tensor, p: Tensor, w: Tensor, entropy: Tensor, slope: Tensor, softcap: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    vocab = z.shape[1]
    largest = z.masked_fill(z == -torch.inf, 0).abs().amax(dim=1)
    # How far rounding moves z_i - max, with what may be read as such a move. The scale: u L; the
    # difference, at most 2 L: 2 u L; the steps by which a running maximum rises, 2 L in all: 2 u L.
    # exp is right to 3 ulp = 6 u; each block of 8192 logits rescales the sums before it by another
    # exp and two products. softcap · tanh(x) is off by 22 u of itself: where it is worst, x = 1/4,
    # e = exp(-2x) = 0.61 is off by 8 u, 1 - e by 14 u, 1 + e by 4 u, and x, the quotient and the
    # product by one or two.
    blocks = -(-vocab // 8192)
    move = eps * (3 * largest + (11 * largest if softcap else 0) + 3 + 4 * blocks)
    # Sums of V terms, in any order: λ √V u, λ = 4 for all practical purposes (Higham, Mary 2019).
    sums = 2 * eps * vocab**0.5
    # H = log s - u/s. Moves of z: Σ p |w| move <= 2 H move. Sums: s to `sums`, u to `sums` of
    # Σ p |z - max| <= H, twice. A log, a quotient, a difference. A tenth for second order.
    entropy_bound = 1.1 * (2 * entropy * move + sums * (1 + 2 * entropy) + eps * (1 + entropy))
    # grad = slope p w. p: its own move, that of s, the sum s and four roundings. w = u/s - d: moves
    # of d and of log s, and the errors of s and H. slope = 1 - (z / softcap)²: 12 eps.
    move, sum_s = move[:, None], sums + 4 * eps
    slope_error = 0.0 if softcap is None else 12 * eps
    p_error = p * w.abs() * (2 * move + sum_s + slope_error)
    w_error = p * (2 * move + sums + entropy_bound[:, None])
    grad_bound = 1.1 * ((slope + slope_error) * (p_error + w_error) + slope_error * p * w.abs())
    return entropy_bound, grad_bound


def stored(exact: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Bound on the error of rounding `exact` to dtype: half an ulp, also among the subnormals.

    Triton's interpreter truncates where it stores bfloat16, and garbles the subnormals: an ulp, or
    the smallest normal number.
    """
    info = torch.finfo(dtype)
    if backend == "triton" and dtype == torch.bfloat16:
        return info.eps * exact.abs() + info.smallest_normal
    return 0.5 * info.eps * (exact.abs() + info.smallest_normal)
