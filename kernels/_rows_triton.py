"""The Triton kernel of the row pass: a value per row of logits, and its gradient.

The criteria and their equations are in `_criterion.py`. One pass over a row keeps (max, s, u): when
the maximum rises by δ, with α = exp(-δ), u ← α (u - δ s) and s ← α s. A second pass makes the
gradient. For a sample, the sums per lane show in which lane the running sum crosses t s: between
the passes the logits of that lane alone are read again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._criterion import LANE_WIDTH, LANES, Criterion
from hfprune_fast.kernels._dispatch import configuration
from hfprune_fast.kernels._philox import uniform_fp32
from hfprune_fast.kernels._triton import cdiv, jit, tl

# One row a program. BLOCK_V logits a step, STAGES - 1 steps loaded ahead; one program of 32 warps
# fills a multiprocessor, so that the rows in flight (132 x 256 KB of bf16 on an H200) stay in L2.
_CONFIGS = {
    "sm": {"BLOCK_V": 8192, "STAGES": 3, "num_warps": 32},
    "gfx": {"BLOCK_V": 8192, "STAGES": 2, "num_warps": 8},
}


@jit
def _load_logits(
    z_ptr, offs_v, V, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, MASKED: tl.constexpr
):
    """Return the transformed logits at offs_v in fp32; MASKED: offs_v may pass V, read as -inf."""
    if MASKED:
        z = tl.load(z_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(z_ptr + offs_v).to(tl.float32)
    if LOGIT_SCALE != 1.0:
        z *= LOGIT_SCALE
    if SOFTCAP is not None:
        z = tl.where(z == float("-inf"), z, SOFTCAP * _tanh(z * (1 / SOFTCAP)))
    return z


@jit
def _tanh(x):
    """Return tanh(x) to a few ulp; near 0, where 1 - exp(-2x) cancels, by its series."""
    e = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@jit
def _add_to_sums(
    z, m, s, u, s_r, CRITERION: tl.constexpr, TEMPERATURE: tl.constexpr
):  # fmt: skip
    """Add logits z to (m, s, u): partial sums per column of z.

    For self_distillation u is Σ d exp(d / TEMPERATURE), and s_r Σ exp(d / TEMPERATURE).
    """
    m_new = tl.maximum(m, tl.max(z, axis=0))
    # -inf - -inf would be NaN: no finite logit yet, so s and u are 0 and every exp is 0.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    # exp(-200) is 0 in fp32; without the bound, delta · s would be -inf and its product NaN.
    delta = tl.where(m == float("-inf"), 0.0, tl.maximum(m - base, -200.0))
    alpha = tl.exp(delta)
    d = z - base
    e = tl.exp(d)
    if CRITERION == "entropy":
        u = alpha * (u + delta * s) + tl.where(e == 0, 0.0, d * e)
    if CRITERION == "self_distillation":
        alpha_r = tl.exp(delta / TEMPERATURE)
        r = tl.exp(d / TEMPERATURE)
        u = alpha_r * (u + delta * s_r) + tl.where(r == 0, 0.0, d * r)
        s_r = alpha_r * s_r + r
    s = alpha * s + e
    return m_new, s, u, s_r


@jit
def _sample(
    z_ptr, V, base, s, target,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    LANES: tl.constexpr, LANE_WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return (y, z_y) of the first y, lane by lane, at which Σ e > target; s: the sums per column.

    If rounding moves the crossing past the last entry, y is the last entry with e_y > 0.
    """
    s = tl.reshape(s, [s.shape[0] // (LANES * LANE_WIDTH), LANES, LANE_WIDTH])
    s = tl.sum(tl.sum(s, axis=2), axis=0)
    lanes = tl.arange(0, LANES)
    lane = tl.min(tl.where((tl.cumsum(s, axis=0) > target) & (s > 0), lanes, LANES), axis=0)
    lane = tl.minimum(lane, tl.max(tl.where(s > 0, lanes, 0), axis=0))
    target -= tl.sum(tl.where(lanes < lane, s, 0.0), axis=0)
    size: tl.constexpr = STEPS * LANE_WIDTH
    nth = tl.arange(0, size)
    offs = nth // LANE_WIDTH * (LANES * LANE_WIDTH) + lane * LANE_WIDTH + nth % LANE_WIDTH
    z = _load_logits(z_ptr, offs, V, SOFTCAP, LOGIT_SCALE, True)
    e = tl.exp(z - base)
    # Entries that reach the target rank by position; those that do not come after all of them, the
    # last one first.
    rank = tl.where(tl.cumsum(e, axis=0) > target, nth, 2 * size - nth)
    rank = tl.min(tl.where(e > 0, rank, 2 * size), axis=0)
    nth_y = tl.where(rank < size, rank, 2 * size - rank)
    y = nth_y // LANE_WIDTH * (LANES * LANE_WIDTH) + lane * LANE_WIDTH + nth_y % LANE_WIDTH
    return y, tl.max(tl.where(nth == nth_y, z, float("-inf")), axis=0)


@jit
def _store_grad(
    z_ptr, grad_ptr, offs_v, V, base, u_over_s, y, label_share, r_share, factor,
    CRITERION: tl.constexpr, TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write factor · s · dvalue/dz of one step; 0 where the entry is masked or the factor is 0."""
    z = _load_logits(z_ptr, offs_v, V, SOFTCAP, LOGIT_SCALE, MASKED)
    d = z - base
    e = tl.where(factor == 0, 0.0, tl.exp(d))
    if CRITERION == "entropy":
        grad = e * factor * (d - u_over_s)
        no_grad = e == 0
    else:
        factors = tl.where(z == float("-inf"), 0.0, factor)
        if CRITERION == "self_distillation":
            e -= r_share * tl.exp(d / TEMPERATURE)
        grad = tl.where(offs_v == y, e - label_share, e) * factors
        no_grad = factors == 0
    if SOFTCAP is not None:
        grad *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
    grad = tl.where(no_grad, 0.0, grad).to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + offs_v, grad, mask=offs_v < V)
    else:
        tl.store(grad_ptr + offs_v, grad)


@jit
def _rows_kernel(
    z_ptr, grad_ptr, row_scale_ptr, key_ptr, value_ptr, stride_zt, stride_gt, V, seed,
    CRITERION: tl.constexpr, ALPHA: tl.constexpr, TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    LANES: tl.constexpr, LANE_WIDTH: tl.constexpr, STEPS: tl.constexpr,
    WRITE_GRAD: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a row: its value and, with WRITE_GRAD, row_scale times its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zt
    offs_v = tl.arange(0, BLOCK_V)
    # Whole steps need no mask: it would split 16-byte loads where V is odd.
    whole = V // BLOCK_V * BLOCK_V
    y = -1
    if CRITERION == "cross_entropy" or CRITERION == "self_distillation":
        label = tl.load(key_ptr + row)
        unlabelled = label == -100  # IGNORED_LABEL
        wrong = (label != -100) & ((label < 0) | (label >= V))
        y = tl.where(unlabelled | wrong, 0, label).to(tl.int32)
        # Read before the reductions below, which synchronise the program's threads: no thread can
        # have overwritten it with a gradient yet.
        z_y = _load_logits(z_ptr, y, V, SOFTCAP, LOGIT_SCALE, False)

    m = -float("inf")
    s = tl.zeros([BLOCK_V], tl.float32)
    u = tl.zeros([BLOCK_V], tl.float32)
    s_r = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        z = _load_logits(z_ptr, start + offs_v, V, SOFTCAP, LOGIT_SCALE, False)
        m, s, u, s_r = _add_to_sums(z, m, s, u, s_r, CRITERION, TEMPERATURE)
    if whole < V:
        z = _load_logits(z_ptr, whole + offs_v, V, SOFTCAP, LOGIT_SCALE, True)
        m, s, u, s_r = _add_to_sums(z, m, s, u, s_r, CRITERION, TEMPERATURE)
    all_masked = m == float("-inf")
    base = tl.where(all_masked, 0.0, m)
    s_sum = tl.where(all_masked, 1.0, tl.sum(s, axis=0))
    u_over_s, r_share = 0.0, 0.0
    if CRITERION == "entropy":
        u_over_s = tl.sum(u, axis=0) / s_sum
        value = tl.log(s_sum) - u_over_s
    else:
        if CRITERION == "fisher":
            target = uniform_fp32(tl.load(key_ptr + row), seed) * s_sum
            y, z_y = _sample(
                z_ptr, V, base, s, target, SOFTCAP, LOGIT_SCALE, LANES, LANE_WIDTH, STEPS
            )  # fmt: skip
            unlabelled = all_masked
        else:
            s_sum = tl.where(wrong, float("nan"), s_sum)
        value = tl.log(s_sum) - (z_y - base)
        if CRITERION == "self_distillation":
            s_r_sum = tl.where(all_masked, 1.0, tl.sum(s_r, axis=0))
            r_share = ALPHA * s_sum / s_r_sum
            divergence = (
                tl.log(s_sum / s_r_sum) + (1 / TEMPERATURE - 1) * tl.sum(u, axis=0) / s_r_sum
            )
            value = (1 - ALPHA) * value + ALPHA * divergence
        value = tl.where(unlabelled, 0.0, value)
    label_share = (1 - ALPHA) * s_sum
    tl.store(value_ptr + row, value)

    if WRITE_GRAD:
        grad_ptr += row * stride_gt
        row_scale = tl.load(row_scale_ptr + row)
        # 0, and not NaN, where row_scale is 0 and the row holds NaN.
        if CRITERION == "entropy":
            factor = tl.where(row_scale == 0, 0.0, -LOGIT_SCALE * row_scale / s_sum)
        else:
            no_grad = (row_scale == 0) | unlabelled
            factor = tl.where(no_grad, 0.0, LOGIT_SCALE * row_scale / s_sum)
        # Backwards: what was read last is still in the cache.
        if whole < V:
            _store_grad(
                z_ptr, grad_ptr, whole + offs_v, V, base, u_over_s, y, label_share, r_share,
                factor, CRITERION, TEMPERATURE, SOFTCAP, LOGIT_SCALE, True,
            )  # fmt: skip
        for offset in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
            _store_grad(
                z_ptr, grad_ptr, whole - BLOCK_V - offset + offs_v, V, base, u_over_s, y,
                label_share, r_share, factor, CRITERION, TEMPERATURE, SOFTCAP, LOGIT_SCALE, False,
            )  # fmt: skip


def rows_triton(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, criterion: Criterion,
    softcap: float | None, logit_scale: float,
) -> Tensor:  # fmt: skip
    """Launch the kernel, one program a row; values are fp32."""
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    config = configuration(_CONFIGS, logits.device)
    steps = cdiv(logits.shape[1], LANES * LANE_WIDTH)
    sampled = criterion.name == "fisher"
    _rows_kernel[(logits.shape[0],)](
        logits,
        grad,
        row_scale,
        criterion.keys,
        values,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        logits.shape[1],
        criterion.seed if sampled else None,
        CRITERION=criterion.name,
        ALPHA=criterion.alpha,
        TEMPERATURE=criterion.temperature,
        SOFTCAP=softcap,
        LOGIT_SCALE=logit_scale,
        LANES=LANES,
        LANE_WIDTH=LANE_WIDTH,
        WRITE_GRAD=grad is not None,
        STEPS=1 << (steps - 1).bit_length() if sampled else 1,
        **config,
    )
    return values
