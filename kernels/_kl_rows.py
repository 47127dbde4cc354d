"""The pass over two rows of logits: the KL divergence of one from the other, and its gradient.

The equations are in `linear_kl.py`, the kernels in `_kl_rows_triton.py` and
`csrc/kl_pass.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._cpp import kl_rows_cpp
from hfprune_fast.kernels._dispatch import choose, device_guard
from hfprune_fast.kernels._kl_rows_triton import kl_rows_triton
from hfprune_fast.kernels._rows import BLOCK_ELEMENTS, transformed

Transform = tuple[float | None, float]  # softcap, logit_scale


def kl_rows_torch(
    logits: Tensor, teacher_logits: Tensor, row_scale: Tensor, grad: Tensor,
    transform: Transform, teacher_transform: Transform,
) -> Tensor:  # fmt: skip
    """Compute the pass by plain torch, a block of rows at a time; values are fp32, or fp64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    rows = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        z, slope = transformed(logits[block], *transform, dtype)
        y, _ = transformed(teacher_logits[block], *teacher_transform, dtype)
        z_d, q, z_s, _ = _softmax(z, dtype)
        y_d, p, y_s, no_teacher = _softmax(y, dtype)
        masked = z_d == -torch.inf
        dz = q.sub_(p)
        log_ratio = y_d.sub_(z_d).add_((z_s / y_s).log_()).masked_fill_(p == 0, 0)
        value = torch.linalg.vecdot(p, log_ratio) + dz.sum(dim=1)
        values[block] = value.masked_fill_(no_teacher.squeeze(1), 0)
        scale = (transform[1] * row_scale[block, None]).masked_fill_(no_teacher, 0)
        dz *= scale
        if slope is not None:
            dz *= slope
        grad[block] = dz.masked_fill_(masked.logical_or_(scale == 0), 0)
    return values


def _softmax(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z - max, p, s = Σ exp(z - max) and whether a row is -inf throughout: p is then 0."""
    base = z.amax(dim=1, keepdim=True).to(dtype)
    masked = base == -torch.inf
    d = z - base.masked_fill_(masked, 0)
    e = d.exp()
    # At least 1, the maximum's own term; the clamp is for a row of only -inf.
    s = e.sum(dim=1, keepdim=True).clamp_(min=1)
    return d, e.div_(s), s, masked


IMPLEMENTATIONS = {"triton": kl_rows_triton, "cpp": kl_rows_cpp, "torch": kl_rows_torch}


def kl_rows_and_grad(
    logits: Tensor,
    teacher_logits: Tensor,
    row_scale: Tensor,
    grad: Tensor,
    transform: Transform,
    teacher_transform: Transform,
    backend: str | None,
) -> Tensor:
    """Return each row's KL(softmax(teacher) ‖ softmax(logits)) in nats, and write the gradient.

    Arguments are (T, V) logits, teacher_logits and grad, and (T,) row_scale; they are not checked.
    grad gets row_scale · dKL/dlogits. It may be the logits, and its dtype and the teacher's may
    differ from theirs. Values are fp32 (fp64 for fp64 logits).
    """
    rows = choose(IMPLEMENTATIONS, backend, logits)
    maths_dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[0], dtype=maths_dtype)
    row_scale = row_scale.to(maths_dtype).contiguous()
    with device_guard(logits):
        return rows(logits, teacher_logits, row_scale, grad, transform, teacher_transform)
