"""The pass over rows of logits that every criterion shares: a value a row, and its gradient.

The criteria and their equations are in `_criterion.py`, the kernels in `_rows_triton.py` and
`csrc/row_pass.cpp`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hfprune_fast.kernels._cpp import rows_cpp
from hfprune_fast.kernels._criterion import ENTROPY, IGNORED_LABEL, LANE_WIDTH, LANES, Criterion
from hfprune_fast.kernels._dispatch import choose, device_guard
from hfprune_fast.kernels._philox import uniform
from hfprune_fast.kernels._rows_triton import rows_triton

# Elements of a block of rows on the torch path: its temporaries stay in a CPU's cache.
BLOCK_ELEMENTS = 1 << 19


def rows_torch(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, criterion: Criterion,
    softcap: float | None, logit_scale: float,
) -> Tensor:  # fmt: skip
    """Compute the pass by plain torch, a block of rows at a time; values are fp32, or fp64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    keys = criterion.keys
    if keys is not None and criterion.name == "fisher":
        keys = uniform(keys, criterion.seed, dtype)
        entries = torch.arange(logits.shape[1], device=logits.device)
        by_lane = entries[(entries // LANE_WIDTH % LANES).argsort(stable=True)]
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        z, slope = transformed(logits[block], softcap, logit_scale, dtype)
        base = z.amax(dim=1, keepdim=True).to(dtype)
        # A row of only -inf would make -inf - -inf; with base 0 every exp below is 0.
        d = z - base.masked_fill_(base == -torch.inf, 0)
        e = d.exp()
        # At least 1, the maximum's own term; the clamp is for a row of only -inf.
        s = e.sum(dim=1, keepdim=True).clamp_(min=1)
        scale = None if row_scale is None else logit_scale * row_scale[block, None]
        if keys is None:
            # The least finite number in place of -inf: d · exp(d) is then 0 and not NaN.
            d.clamp_(min=torch.finfo(dtype).min)
            u_over_s = torch.linalg.vecdot(e, d).unsqueeze(1) / s
            values[block] = (s.log() - u_over_s).squeeze(1)
        else:
            if criterion.name == "fisher":
                y, labelled = _sample(e, keys[block, None] * s, by_lane)
            else:
                y, labelled, s = _clamp_labels(keys[block, None], s, e.shape[1])
            d_y, label_share = d.gather(1, y), 1.0
            value = s.log() - d_y
            if criterion.name == "self_distillation":
                label_share = 1 - criterion.alpha
                divergence = _distil(d, e, s, criterion)
                value = label_share * value + criterion.alpha * divergence
            values[block] = torch.where(labelled, value, 0).squeeze(1)
            if scale is not None:
                scale = torch.where(labelled, scale, 0)
                # Masked entries have no gradient.
                peak = torch.where(d_y == -torch.inf, 0, label_share * s)
                e.scatter_(1, y, e.gather(1, y) - peak)
        if grad is not None and scale is not None:
            e *= (-scale if keys is None else scale) / s
            if slope is not None:
                e *= slope
            if keys is None:
                e.mul_(d.sub_(u_over_s))
            grad[block] = e.masked_fill_(scale == 0, 0)
    return values


def transformed(
    logits: Tensor, softcap: float | None, logit_scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return z = softcap · tanh(logit_scale · logits / softcap), and under a cap its slope.

    The slope is dz/dlogits / logit_scale; -inf stays.
    """
    z = logits
    if logit_scale != 1:
        z = z.to(dtype) * logit_scale
    if softcap is None:
        return z, None
    tanh = (z.to(dtype) / softcap).tanh_()
    slope = tanh.square().neg_().add_(1)
    return tanh.mul_(softcap).masked_fill_(z == -torch.inf, -torch.inf), slope


def _sample(e: Tensor, target: Tensor, by_lane: Tensor) -> tuple[Tensor, Tensor]:
    """Return (T, 1) samples as the kernel draws them, and whether the row has an entry to draw."""
    e = e[:, by_lane]
    possible = e != 0  # true for NaN, so that the row shows it
    reached = (e.cumsum(dim=1) > target).logical_and_(possible)
    nth = reached.view(torch.uint8).argmax(dim=1, keepdim=True)  # the first of the largest
    last = e.shape[1] - 1 - possible.flip(1).view(torch.uint8).argmax(dim=1, keepdim=True)
    nth = torch.where(reached.any(dim=1, keepdim=True), nth, last)
    return by_lane[nth], possible.any(dim=1, keepdim=True)


def _distil(d: Tensor, e: Tensor, s: Tensor, criterion: Criterion) -> Tensor:
    """Return (T, 1) KL(r ‖ p), r = softmax(d / τ), and subtract α s r from e; d loses its -inf."""
    d.clamp_(min=torch.finfo(d.dtype).min)  # d · exp(d) is then 0 and not NaN
    r = (d / criterion.temperature).exp_()
    s_r = r.sum(dim=1, keepdim=True).clamp_(min=1)
    u_over_s = torch.linalg.vecdot(r, d).unsqueeze(1) / s_r
    e.sub_(r.mul_(criterion.alpha * s / s_r))
    return s.log() - s_r.log() + (1 / criterion.temperature - 1) * u_over_s


def _clamp_labels(labels: Tensor, s: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's label, clamped; whether it has one; and s, NaN where it is not an entry."""
    y = labels.clamp(0, vocab - 1)
    labelled = labels != IGNORED_LABEL
    return y, labelled, s.masked_fill((y != labels) & labelled, torch.nan)


IMPLEMENTATIONS = {"triton": rows_triton, "cpp": rows_cpp, "torch": rows_torch}


def rows_loss_and_grad(
    logits: Tensor,
    row_scale: Tensor | None = None,
    grad: Tensor | None = None,
    criterion: Criterion = ENTROPY,
    *,
    softcap: float | None,
    logit_scale: float,
    backend: str | None,
) -> Tensor:
    """Return each row's value in nats; with row_scale, write row_scale · dvalue/dlogits to grad.

    Arguments are (T, V) logits and grad, (T,) row_scale, and are not checked: this serves the
    operations of the package. grad may be the logits; if it is not, its dtype may differ. A label
    that is neither an entry nor -100 makes its row NaN. Values are fp32 (fp64 for fp64 logits).
    """
    rows = choose(IMPLEMENTATIONS, backend, logits)
    maths_dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[0], dtype=maths_dtype)
    if row_scale is not None:
        row_scale = row_scale.to(maths_dtype).contiguous()
    if criterion.keys is not None:
        criterion = replace(criterion, keys=criterion.keys.contiguous())
    with device_guard(logits):
        return rows(logits, row_scale, grad, criterion, softcap, logit_scale)
