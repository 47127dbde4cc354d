"""Shannon entropy of softmax(logits), row by row, with its gradient written over the logits.

For a row z of V logits, with p = softmax(z) and lse = log Σ exp(z):

    H        = -Σ_i p_i log p_i                     (nats)
    dH/dz_i  = -p_i (log p_i + H) = -p_i (z_i - lse + H)

with 0·log 0 = 0, so z_i = -inf (a masked vocabulary entry) gives exactly 0 and never NaN, and a row
of nothing but -inf has H = 0 and no gradient. The equation is the criterion of HFPrune,
arXiv 2603.08083, differentiated by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one block of rows: two fp32 temporaries of it stay in a CPU's last-level cache.
_BLOCK_ELEMENTS = 1 << 20


def softmax_entropy_grad_reference(logits: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (H, row_scale · dH/dlogits), through autograd and out of place."""
    z = logits.detach().to(_compute_dtype(logits)).requires_grad_()
    with torch.enable_grad():
        log_p = torch.log_softmax(z, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        (grad,) = torch.autograd.grad(entropy, z, row_scale.to(z.dtype))
    return entropy.detach(), grad.to(logits.dtype)


def softmax_entropy_grad_(logits: Tensor, row_scale: Tensor) -> Tensor:
    """Overwrite logits with row_scale · dH/dlogits and return H.

    Args:
        logits: (T, V) bf16, fp16, fp32 or fp64, rows of any stride; overwritten.
        row_scale: (T,) factor of each row's gradient, for example 1 / sequence length.

    Returns:
        H: (T,) in nats; fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: logits is not a 2-D floating-point tensor or row_scale is not (T,).

    The maths is fp32 (fp64 for fp64 logits) whatever the dtype of the logits; extra memory is two
    blocks of about a million elements.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a (T, V) float tensor, got {tuple(logits.shape)} {logits.dtype}"
        )
    if row_scale.shape != logits.shape[:1]:
        raise ValueError(
            f"row_scale must be ({logits.shape[0]},), one factor a row, "
            f"got {tuple(row_scale.shape)}"
        )
    dtype = _compute_dtype(logits)
    entropy = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    if logits.numel() == 0:
        return entropy.zero_()
    rows = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        block = logits[start : start + rows]
        row_max = block.amax(dim=1, keepdim=True).to(dtype)
        # A row of only -inf would make -inf - -inf; with 0 in its place every p is 0 below.
        row_max = row_max.masked_fill_(row_max == -torch.inf, 0)
        log_p = block.to(dtype).sub(row_max)
        # At least 1, the maximum's own term, but for a row of only -inf.
        sum_exp = log_p.exp().sum(dim=1, keepdim=True).clamp_(min=1)
        # The smallest finite number for -inf, so that p · log p is 0 where p is.
        log_p.sub_(sum_exp.log()).clamp_(min=torch.finfo(dtype).min)
        p = log_p.exp()
        h = -torch.linalg.vecdot(p, log_p).unsqueeze(1)
        entropy[start : start + rows] = h.squeeze(1)
        p *= row_scale[start : start + rows, None].to(dtype)
        block.copy_(log_p.add_(h).mul_(p).neg_())
    return entropy


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
