"""The Triton kernel of the pass over two rows of logits: their KL divergence, and its gradient.

The equations are in `linear_kl.py`. One pass over both rows keeps (max, s) of each, per lane of a
tile, so that nothing is exchanged between threads until its end. A second one makes the value and
the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._dispatch import configuration
from hfprune_fast.kernels._lanes_triton import exponent_factor, raised, transformed
from hfprune_fast.kernels._triton import jit, tl

# One pair of rows a program, and a lane a thread: 16 bytes of each row a step, one step loaded
# ahead. As in `_rows_triton.py` one program fills a multiprocessor of NVIDIA's.
_CONFIGS = {
    "sm": {"LANES": 1024, "num_warps": 32, "maxnreg": 64},
    "gfx": {"LANES": 512, "num_warps": 8},
}


@jit
def _add_to_lanes(
    z, m, base, s, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, FACTOR: tl.constexpr
):
    """Add logits z (LANES, WIDTH), as loaded, to each lane's maximum, base and sum of 2^d."""
    z = transformed(z, SOFTCAP, LOGIT_SCALE)
    m, base, delta, d = raised(z, m, base, FACTOR, -200.0)
    return m, base, s * tl.exp2(delta) + tl.sum(tl.exp2(d), axis=1)


@jit
def _merge_lanes(m, base, s):
    """Return the row's log2 Σ exp z, 0 where it is -inf throughout, and whether it is."""
    row_base = tl.max(base, axis=0)
    s = tl.sum(s * tl.exp2(base - row_base), axis=0)
    masked = (tl.max(m, axis=0) == float("-inf")) & (s == 0)
    # A row of finite logits below -2e38 has no exponents in fp32: NaN.
    lse = tl.where(s == 0, float("nan"), row_base + tl.log2(s))
    return tl.where(masked, 0.0, lse), masked


@jit
def _kl_and_grad(
    z, y, z_lse, y_lse, factor, kl, rest, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    FACTOR: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, TEACHER_LOGIT_SCALE: tl.constexpr,
    TEACHER_FACTOR: tl.constexpr,
):  # fmt: skip
    """Return each lane's kl + Σ p log2(p / q) and rest + Σ q - p, and factor · (q - p).

    The last is 0 where z is -inf. z and y: logits as loaded.
    """
    y = transformed(y, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE)
    z = transformed(z, SOFTCAP, LOGIT_SCALE)
    log_p, log_q = y * TEACHER_FACTOR - y_lse, z * FACTOR - z_lse
    p = tl.exp2(log_p)
    grad = tl.exp2(log_q) - p
    kl += tl.sum(p * tl.where(p == 0, 0.0, log_p - log_q), axis=1)
    rest += tl.sum(grad, axis=1)
    grad = tl.where(z == float("-inf"), 0.0, grad * factor)
    if SOFTCAP is not None:
        grad *= 1 - tl.maximum(z, -1.0) * tl.maximum(z, -1.0)
    # Where a row holds NaN and its factor is 0.
    return kl, rest, tl.where(factor == 0, 0.0, grad)


@jit
def _kl_rows_kernel(
    z_ptr, y_ptr, grad_ptr, row_scale_ptr, value_ptr, stride_zt, stride_yt, stride_gt, V,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, FACTOR: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr, TEACHER_LOGIT_SCALE: tl.constexpr,
    TEACHER_FACTOR: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a row t: KL(softmax(y_t) ‖ softmax(z_t)), and row_scale_t times its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zt
    y_ptr += row * stride_yt
    grad_ptr += row * stride_gt
    STEP: tl.constexpr = LANES * WIDTH
    offs_v = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Whole steps need no mask: it would split 16-byte loads where V is odd.
    whole = V // STEP * STEP
    in_tail = whole + offs_v < V
    z_tail = tl.load(z_ptr + whole + offs_v, mask=in_tail, other=float("-inf"))
    y_tail = tl.load(y_ptr + whole + offs_v, mask=in_tail, other=float("-inf"))

    z_m = tl.full([LANES], float("-inf"), tl.float32)
    y_m = tl.full([LANES], float("-inf"), tl.float32)
    z_base = tl.full([LANES], -3e38, tl.float32)
    y_base = tl.full([LANES], -3e38, tl.float32)
    z_s = tl.zeros([LANES], tl.float32)
    y_s = tl.zeros([LANES], tl.float32)
    z, y = z_tail.to(tl.float32), y_tail.to(tl.float32)
    for start in range(0, whole, STEP):
        z_ahead = tl.load(z_ptr + start + offs_v)
        y_ahead = tl.load(y_ptr + start + offs_v)
        z_m, z_base, z_s = _add_to_lanes(z, z_m, z_base, z_s, SOFTCAP, LOGIT_SCALE, FACTOR)
        y_m, y_base, y_s = _add_to_lanes(
            y, y_m, y_base, y_s, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, TEACHER_FACTOR
        )
        z, y = z_ahead.to(tl.float32), y_ahead.to(tl.float32)
    z_m, z_base, z_s = _add_to_lanes(z, z_m, z_base, z_s, SOFTCAP, LOGIT_SCALE, FACTOR)
    y_m, y_base, y_s = _add_to_lanes(
        y, y_m, y_base, y_s, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, TEACHER_FACTOR
    )
    z_lse, _ = _merge_lanes(z_m, z_base, z_s)
    y_lse, no_teacher = _merge_lanes(y_m, y_base, y_s)

    row_scale = tl.load(row_scale_ptr + row)
    factor = tl.where((row_scale == 0) | no_teacher, 0.0, LOGIT_SCALE * row_scale)
    kl = tl.zeros([LANES], tl.float32)
    rest = tl.zeros([LANES], tl.float32)
    # Backwards: what was read last is still in the cache.
    start = whole - STEP
    z = tl.load(z_ptr + start + offs_v, mask=start >= 0)
    y = tl.load(y_ptr + start + offs_v, mask=start >= 0)
    # A select, through which LLVM moves no conversion into the loop.
    z = tl.where(start >= 0, z.to(tl.float32), 0.0)
    y = tl.where(start >= 0, y.to(tl.float32), 0.0)
    kl, rest, grad = _kl_and_grad(
        z_tail, y_tail, z_lse, y_lse, factor, kl, rest, SOFTCAP, LOGIT_SCALE, FACTOR,
        TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, TEACHER_FACTOR,
    )  # fmt: skip
    tl.store(grad_ptr + whole + offs_v, grad.to(grad_ptr.dtype.element_ty), mask=in_tail)
    for offset in range(0, whole, STEP):
        start = whole - STEP - offset
        z_ahead = tl.load(z_ptr + start - STEP + offs_v, mask=start > 0)
        y_ahead = tl.load(y_ptr + start - STEP + offs_v, mask=start > 0)
        kl, rest, grad = _kl_and_grad(
            z, y, z_lse, y_lse, factor, kl, rest, SOFTCAP, LOGIT_SCALE, FACTOR,
            TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE, TEACHER_FACTOR,
        )  # fmt: skip
        tl.store(grad_ptr + start + offs_v, grad.to(grad_ptr.dtype.element_ty))
        z, y = z_ahead.to(tl.float32), y_ahead.to(tl.float32)
    value = 0.6931471805599453 * tl.sum(kl, axis=0) + tl.sum(rest, axis=0)  # ln 2
    tl.store(value_ptr + row, tl.where(no_teacher, 0.0, value))


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
        FACTOR=exponent_factor(softcap, logit_scale),
        TEACHER_SOFTCAP=teacher_softcap,
        TEACHER_LOGIT_SCALE=teacher_logit_scale,
        TEACHER_FACTOR=exponent_factor(teacher_softcap, teacher_logit_scale),
        WIDTH=16 // grad.element_size(),  # wider stores would be split between threads
        **configuration(_CONFIGS, logits.device),
    )
    return values
