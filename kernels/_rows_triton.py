"""The Triton kernel of the row pass: a value per row of logits, and its gradient.

The criteria and their equations are in `_criterion.py`. One pass over a row keeps (max, s, u) of
each lane: when the maximum rises by δ, with α = exp(-δ), u ← α (u - δ s) and s ← α s; at the row's
end the lanes are merged alike. A second pass makes the gradient. For a sample, the sums of the
lanes show in which one the running sum crosses t s: between the passes the logits of that lane
alone are read again. Inside the loops no thread waits for another one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._criterion import LANE_WIDTH, LANES, Criterion
from hfprune_fast.kernels._dispatch import configuration
from hfprune_fast.kernels._lanes_triton import exponent_factor, raised, transformed
from hfprune_fast.kernels._philox import uniform_fp32
from hfprune_fast.kernels._triton import cdiv, jit, tl

# One row a program, and a lane a thread: 16 bytes of the row a step, one step loaded ahead. Of long
# rows one program fills a multiprocessor, as maxnreg keeps ptxas from saving registers for a second
# one: the rows in flight (132 x 256 KB of bf16 on an H100) stay in L2. Of short ones several share,
# and of fp32 with a narrower gradient, which takes more registers than 1024 threads have.
_CONFIGS = {
    "sm": {"LANES": 1024, "num_warps": 32, "maxnreg": 64},
    "gfx": {"LANES": 512, "num_warps": 8},
}
_SHARED_CONFIGS = {
    "sm": {"LANES": 512, "num_warps": 16},
    "gfx": {"LANES": 512, "num_warps": 8},
}
_SHORT_BYTES = 128 << 10


@jit
def _add_to_lanes(
    z, m, base, s, u, s_r, CRITERION: tl.constexpr, TEMPERATURE: tl.constexpr,
    FACTOR: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Add logits z to the lanes; u is Σ d 2^d, and 2^d is 0 in fp32 at LOWEST.

    For self_distillation u is Σ d 2^(d / TEMPERATURE), and s_r Σ 2^(d / TEMPERATURE).
    """
    m, base, delta, d = raised(z, m, base, FACTOR, LOWEST)
    # Of a NaN tl.maximum returns the other one: e is of the d before, and shows it.
    alpha, e = tl.exp2(delta), tl.exp2(d)
    if CRITERION == "entropy":
        u = alpha * (u + delta * s) + tl.sum(tl.maximum(d, LOWEST) * e, axis=1)
    if CRITERION == "self_distillation":
        alpha_r, r = tl.exp2(delta * (1 / TEMPERATURE)), tl.exp2(d * (1 / TEMPERATURE))
        u = alpha_r * (u + delta * s_r) + tl.sum(tl.maximum(d, LOWEST) * r, axis=1)
        s_r = alpha_r * s_r + tl.sum(r, axis=1)
    s = alpha * s + tl.sum(e, axis=1)
    return m, base, s, u, s_r


@jit
def _sample(
    z_ptr, V, base, s, target, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    FACTOR: tl.constexpr, LANES: tl.constexpr, LANE_WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return (y, z_y) of the first y, lane by lane, at which Σ e > target; s: a sum a lane.

    If rounding moves the crossing past the last entry, y is the last entry with e_y > 0.
    """
    lanes = tl.arange(0, LANES)
    lane = tl.min(tl.where((tl.cumsum(s, axis=0) > target) & (s > 0), lanes, LANES), axis=0)
    lane = tl.minimum(lane, tl.max(tl.where(s > 0, lanes, 0), axis=0))
    target -= tl.sum(tl.where(lanes < lane, s, 0.0), axis=0)
    size: tl.constexpr = STEPS * LANE_WIDTH
    nth = tl.arange(0, size)
    offs = nth // LANE_WIDTH * (LANES * LANE_WIDTH) + lane * LANE_WIDTH + nth % LANE_WIDTH
    z = tl.load(z_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
    e = tl.exp2(transformed(z, SOFTCAP, LOGIT_SCALE) * FACTOR - base)
    # Entries that reach the target rank by position; those that do not come after all of them, the
    # last one first.
    rank = tl.where(tl.cumsum(e, axis=0) > target, nth, 2 * size - nth)
    rank = tl.min(tl.where(e > 0, rank, 2 * size), axis=0)
    nth_y = tl.where(rank < size, rank, 2 * size - rank)
    y = nth_y // LANE_WIDTH * (LANES * LANE_WIDTH) + lane * LANE_WIDTH + nth_y % LANE_WIDTH
    return y, tl.max(tl.where(nth == nth_y, z, float("-inf")), axis=0)


@jit
def _gradient(
    z, base, u_over_s, r_share, label_share, factor, CRITERION: tl.constexpr,
    TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    FACTOR: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Return factor · s · dvalue/dz of logits z as loaded; label_share: None but for the label."""
    z = transformed(z, SOFTCAP, LOGIT_SCALE)
    d = z * FACTOR - base
    grad = tl.exp2(d)
    if CRITERION == "entropy":
        grad *= tl.maximum(d, LOWEST) * factor - u_over_s * factor
    else:
        if CRITERION == "self_distillation":
            grad -= r_share * tl.exp2(d * (1 / TEMPERATURE))
        if label_share is not None:
            grad = tl.where(z == float("-inf"), 0.0, grad - label_share)
        grad *= factor
    if SOFTCAP is not None:
        # Of a masked entry the gradient is 0, and z² infinite.
        grad *= 1 - tl.maximum(z, -1.0) * tl.maximum(z, -1.0)
    return grad


@jit
def _write_gradient(
    z_ptr, grad_ptr, tail, whole, V, offs_v, base, u_over_s, r_share, factor,
    CRITERION: tl.constexpr, TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr, FACTOR: tl.constexpr, LOWEST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row, without the label's share; z_ptr and grad_ptr may be equal."""
    # Backwards: what was read last is still in the cache.
    start = whole - STEP
    z = tl.load(z_ptr + start + offs_v, mask=start >= 0)
    # A select, through which LLVM moves no conversion into the loop.
    z = tl.where(start >= 0, z.to(tl.float32), 0.0)
    grad = _gradient(
        tail, base, u_over_s, r_share, None, factor,
        CRITERION, TEMPERATURE, SOFTCAP, LOGIT_SCALE, FACTOR, LOWEST,
    )  # fmt: skip
    offs_tail = whole + offs_v
    tl.store(grad_ptr + offs_tail, grad.to(grad_ptr.dtype.element_ty), mask=offs_tail < V)
    for offset in range(0, whole, STEP):
        start = whole - STEP - offset
        ahead = tl.load(z_ptr + start - STEP + offs_v, mask=start > 0)
        grad = _gradient(
            z, base, u_over_s, r_share, None, factor,
            CRITERION, TEMPERATURE, SOFTCAP, LOGIT_SCALE, FACTOR, LOWEST,
        )  # fmt: skip
        tl.store(grad_ptr + start + offs_v, grad.to(grad_ptr.dtype.element_ty))
        z = ahead.to(tl.float32)


@jit
def _rows_kernel(
    z_ptr, grad_ptr, row_scale_ptr, key_ptr, value_ptr, stride_zt, stride_gt, V, seed,
    CRITERION: tl.constexpr, ALPHA: tl.constexpr, TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, FACTOR: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, DRAWN_LANES: tl.constexpr,
    DRAWN_WIDTH: tl.constexpr, STEPS: tl.constexpr, WRITE_GRAD: tl.constexpr,
):  # fmt: skip
    """One program a row: its value and, with WRITE_GRAD, row_scale times its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zt
    STEP: tl.constexpr = LANES * WIDTH
    LOWEST: tl.constexpr = -200.0 * (TEMPERATURE if TEMPERATURE > 1 else 1)
    offs_v = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Whole steps need no mask: it would split 16-byte loads where V is odd.
    whole = V // STEP * STEP
    if CRITERION == "cross_entropy" or CRITERION == "self_distillation":
        label = tl.load(key_ptr + row)
        unlabelled = label == -100  # IGNORED_LABEL
        wrong = (label != -100) & ((label < 0) | (label >= V))
        y = tl.where(unlabelled | wrong, 0, label).to(tl.int32)
        # Read before the reductions below, which synchronise the program's threads: no thread can
        # have overwritten it with a gradient yet.
        z_y = tl.load(z_ptr + y).to(tl.float32)

    tail = tl.load(z_ptr + whole + offs_v, mask=whole + offs_v < V, other=float("-inf"))
    m = tl.full([LANES], float("-inf"), tl.float32)
    base = tl.full([LANES], -3e38, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    s_r = tl.zeros([LANES], tl.float32)
    z = tail.to(tl.float32)
    for start in range(0, whole, STEP):
        ahead = tl.load(z_ptr + start + offs_v)
        m, base, s, u, s_r = _add_to_lanes(
            transformed(z, SOFTCAP, LOGIT_SCALE), m, base, s, u, s_r,
            CRITERION, TEMPERATURE, FACTOR, LOWEST,
        )  # fmt: skip
        z = ahead.to(tl.float32)
    z = transformed(z, SOFTCAP, LOGIT_SCALE)
    m, base, s, u, s_r = _add_to_lanes(
        z, m, base, s, u, s_r, CRITERION, TEMPERATURE, FACTOR, LOWEST
    )

    # The lanes are merged as if each one's base rose to the row's.
    row_base = tl.max(base, axis=0)
    delta = tl.maximum(base - row_base, LOWEST)
    all_masked = tl.max(m, axis=0) == float("-inf")
    if CRITERION == "entropy":
        u = tl.exp2(delta) * (u + delta * s)
    if CRITERION == "self_distillation":
        u = tl.exp2(delta * (1 / TEMPERATURE)) * (u + delta * s_r)
        s_r *= tl.exp2(delta * (1 / TEMPERATURE))
    s *= tl.exp2(delta)
    base = row_base
    s_sum = tl.sum(s, axis=0)
    all_masked = all_masked & (s_sum == 0)
    # A row of finite logits below -2e38 has no exponents in fp32: NaN.
    s_sum = tl.where(s_sum == 0, tl.where(all_masked, 1.0, float("nan")), s_sum)
    LN_2: tl.constexpr = 0.6931471805599453
    u_over_s, r_share = 0.0, 0.0
    if CRITERION == "entropy":
        u_over_s = tl.sum(u, axis=0) / s_sum
        value = LN_2 * (tl.log2(s_sum) - u_over_s)
    else:
        if CRITERION == "fisher":
            target = uniform_fp32(tl.load(key_ptr + row), seed) * s_sum
            s = tl.reshape(
                s, [STEP // (DRAWN_LANES * DRAWN_WIDTH), DRAWN_LANES, DRAWN_WIDTH // WIDTH]
            )
            y, z_y = _sample(
                z_ptr, V, base, tl.sum(tl.sum(s, axis=2), axis=0), target, SOFTCAP, LOGIT_SCALE,
                FACTOR, DRAWN_LANES, DRAWN_WIDTH, STEPS,
            )  # fmt: skip
            unlabelled = all_masked
        else:
            s_sum = tl.where(wrong, float("nan"), s_sum)
        d_y = transformed(z_y, SOFTCAP, LOGIT_SCALE) * FACTOR - base
        value = tl.log2(s_sum) - d_y
        if CRITERION == "self_distillation":
            s_r_sum = tl.where(all_masked, 1.0, tl.sum(s_r, axis=0))
            r_share = ALPHA * s_sum / s_r_sum
            divergence = (
                tl.log2(s_sum / s_r_sum) + (1 / TEMPERATURE - 1) * tl.sum(u, axis=0) / s_r_sum
            )
            value = (1 - ALPHA) * value + ALPHA * divergence
        value = tl.where(unlabelled, 0.0, LN_2 * value)
    tl.store(value_ptr + row, value)

    if WRITE_GRAD:
        grad_ptr += row * stride_gt
        row_scale = tl.load(row_scale_ptr + row)
        factor = LOGIT_SCALE * row_scale / s_sum
        no_grad = row_scale == 0
        if CRITERION == "entropy":
            factor *= -LN_2
        else:
            no_grad = no_grad | unlabelled
        if no_grad:  # and not NaN, if the row holds one
            zeros = tl.zeros([LANES, WIDTH], grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + whole + offs_v, zeros, mask=whole + offs_v < V)
            for start in range(0, whole, STEP):
                tl.store(grad_ptr + start + offs_v, zeros)
        else:
            _write_gradient(
                z_ptr, grad_ptr, tail, whole, V, offs_v, base, u_over_s, r_share, factor,
                CRITERION, TEMPERATURE, SOFTCAP, LOGIT_SCALE, FACTOR, LOWEST, STEP,
            )  # fmt: skip
            if CRITERION != "entropy":
                tl.debug_barrier()  # after the thread that wrote the label's entry with the rest
                grad = _gradient(
                    z_y, base, u_over_s, r_share, (1 - ALPHA) * s_sum, factor,
                    CRITERION, TEMPERATURE, SOFTCAP, LOGIT_SCALE, FACTOR, LOWEST,
                )  # fmt: skip
                tl.store(grad_ptr + y, grad.to(grad_ptr.dtype.element_ty))


def rows_triton(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, criterion: Criterion,
    softcap: float | None, logit_scale: float,
) -> Tensor:  # fmt: skip
    """Launch the kernel, one program a row; values are fp32."""
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    vocab, size = logits.shape[1], logits.element_size()
    width = 16 // min(size, size if grad is None else grad.element_size())
    shared = width == 8 and (size == 4 or size * vocab <= _SHORT_BYTES)
    config = configuration(_SHARED_CONFIGS if shared else _CONFIGS, logits.device)
    # The lanes of a draw, or several of its lanes' parts, are in a step.
    config["LANES"] = max(config["LANES"], LANES * LANE_WIDTH // width)
    sampled = criterion.name == "fisher"
    _rows_kernel[(logits.shape[0],)](
        logits,
        grad,
        row_scale,
        criterion.keys,
        values,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        vocab,
        criterion.seed if sampled else None,
        CRITERION=criterion.name,
        ALPHA=criterion.alpha,
        TEMPERATURE=criterion.temperature,
        SOFTCAP=softcap,
        LOGIT_SCALE=logit_scale,
        FACTOR=exponent_factor(softcap, logit_scale),
        WIDTH=width,
        DRAWN_LANES=LANES,
        DRAWN_WIDTH=LANE_WIDTH,
        WRITE_GRAD=grad is not None,
        STEPS=_power_of_2(cdiv(vocab, LANES * LANE_WIDTH)) if sampled else 1,
        **config,
    )
    return values


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below number."""
    return 1 << (number - 1).bit_length()
