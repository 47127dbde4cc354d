"""The Triton kernel of the pass over two rows of logits: their KL divergence, and its gradient.

The equations are in `linear_kl.py`. One pass over both rows keeps (max, s) of each, per lane of a
tile, so that nothing is exchanged between threads until its end. A second one makes the value and
the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._dispatch import configuration
from hfprune_fast.kernels._rows_triton import _load_logits
from hfprune_fast.kernels._triton import jit, tl

# One pair of rows a program, and a lane a thread: 16 bytes of each row a step, STAGES - 1 steps
# loaded ahead. As in `_rows_triton.py` one program fills a multiprocessor of NVIDIA's.
_CONFIGS = {
    "sm": {"LANES": 1024, "STAGES": 3, "num_warps": 32},
    "gfx": {"LANES": 512, "STAGES": 2, "num_warps": 8},
}


@jit
def _add_to_lanes(z, m, s):
    """Add logits z (LANES, WIDTH) to each lane's maximum m and sum s of exp(z - m)."""
    m_new = tl.maximum(m, tl.max(z, axis=1))
    # -inf - -inf would be NaN: no finite logit yet, and every exp is 0.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
    return m_new, s


@jit
def _merge_lanes(m, s):
    """Return the row's (base, s, whether it is -inf throughout); base is 0 and s 1 if it is."""
    m_row = tl.max(m, axis=0)
    masked = m_row == float("-inf")
    base = tl.where(masked, 0.0, m_row)
    return base, tl.where(masked, 1.0, tl.sum(s * tl.exp(m - base), axis=0)), masked


@jit
def _kl_and_grad(
    z_ptr, y_ptr, grad_ptr, offs_v, V, z_base, y_base, z_s, y_s, factor, value,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr, TEACHER_LOGIT_SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return value (LANES,) plus a step's terms; write factor · (q - p), 0 where z is -inf."""
    y = _load_logits(y_ptr, offs_v, V, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, MASKED)
    z = _load_logits(z_ptr, offs_v, V, SOFTCAP, LOGIT_SCALE, MASKED)
    y_d, z_d = y - y_base, z - z_base
    p = tl.exp(y_d) / y_s
    grad = tl.exp(z_d) / z_s - p
    log_ratio = tl.where(p == 0, 0.0, (y_d - z_d) + tl.log(z_s / y_s))
    value += tl.sum(p * log_ratio + grad, axis=1)
    factors = tl.where(z == float("-inf"), 0.0, factor)
    grad *= factors
    if SOFTCAP is not None:
        grad *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
    grad = tl.where(factors == 0, 0.0, grad).to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + offs_v, grad, mask=offs_v < V)
    else:
        tl.store(grad_ptr + offs_v, grad)
    return value


@jit
def _kl_rows_kernel(
    z_ptr, y_ptr, grad_ptr, row_scale_ptr, value_ptr, stride_zt, stride_yt, stride_gt, V,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr, TEACHER_LOGIT_SCALE: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a row t: KL(softmax(y_t) ‖ softmax(z_t)), and row_scale_t times its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zt
    y_ptr += row * stride_yt
    grad_ptr += row * stride_gt
    step: tl.constexpr = LANES * WIDTH
    offs_v = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Whole steps need no mask: it would split 16-byte loads where V is odd.
    whole = V // step * step

    z_m = tl.full([LANES], float("-inf"), tl.float32)
    y_m = tl.full([LANES], float("-inf"), tl.float32)
    z_sums = tl.zeros([LANES], tl.float32)
    y_sums = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, whole, step, num_stages=STAGES):
        z = _load_logits(z_ptr, start + offs_v, V, SOFTCAP, LOGIT_SCALE, False)
        y = _load_logits(y_ptr, start + offs_v, V, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, False)
        z_m, z_sums = _add_to_lanes(z, z_m, z_sums)
        y_m, y_sums = _add_to_lanes(y, y_m, y_sums)
    if whole < V:
        z = _load_logits(z_ptr, whole + offs_v, V, SOFTCAP, LOGIT_SCALE, True)
        y = _load_logits(y_ptr, whole + offs_v, V, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, True)
        z_m, z_sums = _add_to_lanes(z, z_m, z_sums)
        y_m, y_sums = _add_to_lanes(y, y_m, y_sums)
    z_base, z_s, _ = _merge_lanes(z_m, z_sums)
    y_base, y_s, no_teacher = _merge_lanes(y_m, y_sums)

    row_scale = tl.load(row_scale_ptr + row)
    # 0, and not NaN, where row_scale is 0 and a row holds NaN.
    factor = tl.where((row_scale == 0) | no_teacher, 0.0, LOGIT_SCALE * row_scale)
    value = tl.zeros([LANES], tl.float32)
    # Backwards: what was read last is still in the cache.
    if whole < V:
        value = _kl_and_grad(
            z_ptr, y_ptr, grad_ptr, whole + offs_v, V, z_base, y_base, z_s, y_s, factor, value,
            SOFTCAP, LOGIT_SCALE, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, True,
        )  # fmt: skip
    for offset in tl.range(0, whole, step, num_stages=STAGES):
        value = _kl_and_grad(
            z_ptr, y_ptr, grad_ptr, whole - step - offset + offs_v, V, z_base, y_base, z_s, y_s,
            factor, value, SOFTCAP, LOGIT_SCALE, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, False,
        )  # fmt: skip
    tl.store(value_ptr + row, tl.where(no_teacher, 0.0, tl.sum(value, axis=0)))


def kl_rows_triton(
    logits: Tensor, teacher_logits: Tensor, row_scale: Tensor, grad: Tensor,
    transform: tuple[float | None, float], teacher_transform: tuple[float | None, float],
) -> Tensor:  # fmt: skip
    """Launch the kernel, one program a row; values are fp32."""
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    softcap, logit_scale = transform
    teacher_softcap, teacher_logit_scale = teacher_transform
    _kl_rows_kernel[(logits.shape[0],)](
        logits,
        teacher_logits,
        grad,
        row_scale,
        values,
        logits.stride(0),
        teacher_logits.stride(0),
        grad.stride(0),
        logits.shape[1],
        SOFTCAP=softcap,
        LOGIT_SCALE=logit_scale,
        TEACHER_SOFTCAP=teacher_softcap,
        TEACHER_LOGIT_SCALE=teacher_logit_scale,
        WIDTH=16 // min(logits.element_size(), teacher_logits.element_size(), grad.element_size()),
        **configuration(_CONFIGS, logits.device),
    )
    return values
