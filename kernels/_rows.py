"""The pass over rows of logits that every criterion shares: a value a row, and its gradient.

For a row z of V logits, with p = softmax(z), d_i = z_i - max(z), e = exp(d), s = Σ e, u = Σ d e:

    entropy        H = -Σ_i p_i log p_i = log s - u/s      dH/dz_i = -p_i (d_i - u/s)
    cross_entropy  -log p_y = log s - d_y                  its gradient p_i - [i = y]
    fisher         the same for a y that is drawn from p: the smallest y with e_0 + … + e_y > t s,
                   t the uniform number of the row's id (`_philox.py`)

in nats. The mean of the outer products of fisher's gradients is the Fisher information. Some
families transform the logits first, z ← softcap · tanh(logit_scale · z / softcap); the gradient is
then that at the logits given. A masked entry, z_i = -inf, adds exactly 0 and has no gradient, and
never NaN; nor has it one as a label, when the value is inf. A row without a label has value and
gradient 0, and so has one of nothing but -inf, where there is no label to ask for.

The kernel makes one pass for (max, s, u): when the maximum rises by δ, with α = exp(-δ),
u ← α (u - δ s) and s ← α s. A second pass over the row makes the gradient. For a sample, s is kept
by step, so that only the step where the sum crosses t s is read again in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfprune_fast.kernels._dispatch import configuration, resolve_backend, undisturbed
from hfprune_fast.kernels._philox import uniform, uniform_fp32
from hfprune_fast.kernels._triton import cdiv, jit, tl

IGNORED_LABEL = -100  # torch's ignore_index

# Elements of a block of rows on the torch path: its temporaries stay in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 19
# One row a program. BLOCK_V logits a step, STAGES - 1 steps loaded ahead; one program of 32 warps
# fills a multiprocessor, so that the rows in flight (132 x 256 KB of bf16 on an H200) stay in L2.
_CONFIGS = {
    "sm": {"BLOCK_V": 8192, "STAGES": 3, "num_warps": 32},
    "gfx": {"BLOCK_V": 8192, "STAGES": 2, "num_warps": 8},
}


@dataclass(frozen=True)
class Criterion:
    """What a row is judged by; `keys` are labels of cross_entropy, ids of rows for fisher."""

    name: str = "entropy"
    keys: Tensor | None = None  # (T,) int64
    seed: int = 0


ENTROPY = Criterion()


@jit
def _load_logits(
    z_ptr, offs_v, V, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, MASKED: tl.constexpr
):
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
    """To a few units in the last place; near 0, where 1 - exp(-2x) cancels, by its series."""
    e = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@jit
def _add_to_sums(z, start, m, s, u, CRITERION: tl.constexpr, BLOCK_V: tl.constexpr):
    """Take logits z into (m, s, u); s and u are one partial sum a column of z, or s one a step."""
    m_new = tl.maximum(m, tl.max(z, axis=0))
    # -inf - -inf would be NaN: no finite logit yet, so nothing to rescale and every exp is 0.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    # exp(-200) is 0 in fp32; without the bound, delta · s would be -inf and its product NaN.
    delta = tl.where(m == float("-inf"), 0.0, tl.maximum(m - base, -200.0))
    alpha = tl.exp(delta)
    d = z - base
    e = tl.exp(d)
    if CRITERION == "entropy":
        u = alpha * (u + delta * s) + tl.where(e == 0, 0.0, d * e)
    if CRITERION == "fisher":
        e = tl.where(tl.arange(0, s.shape[0]) == start // BLOCK_V, tl.sum(e, axis=0), 0.0)
    s = alpha * s + e
    return m_new, s, u


@jit
def _sample(
    z_ptr, V, base, s, target,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, BLOCK_V: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return (y, z_y) for the smallest y with e_0 + … + e_y > target; s is the sum of each step.

    Where rounding puts the crossing behind all of them, the last that has a share: e_y is never 0.
    """
    step = tl.arange(0, STEPS)
    up_to = tl.sum(tl.where(step[None, :] <= step[:, None], s[None, :], 0.0), axis=1)
    crossing = tl.min(tl.where((up_to > target) & (s > 0), step, STEPS), axis=0)
    crossing = tl.minimum(crossing, tl.max(tl.where(s > 0, step, 0), axis=0))
    target -= tl.sum(tl.where(step < crossing, s, 0.0), axis=0)
    offs = tl.arange(0, BLOCK_V)
    z = _load_logits(z_ptr, crossing * BLOCK_V + offs, V, SOFTCAP, LOGIT_SCALE, True)
    e = tl.exp(z - base)
    # One reduction, as two take more registers than there are: behind those that reach the target,
    # from the last one on, come those that do not.
    rank = tl.where(tl.cumsum(e, axis=0) > target, offs, 2 * BLOCK_V - offs)
    rank = tl.min(tl.where(e > 0, rank, 2 * BLOCK_V), axis=0)
    offs_y = tl.where(rank < BLOCK_V, rank, 2 * BLOCK_V - rank)
    return crossing * BLOCK_V + offs_y, tl.max(tl.where(offs == offs_y, z, float("-inf")), axis=0)


@jit
def _store_grad(
    z_ptr, grad_ptr, offs_v, V, base, s_sum, u_over_s, y, factor, CRITERION: tl.constexpr,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    z = _load_logits(z_ptr, offs_v, V, SOFTCAP, LOGIT_SCALE, MASKED)
    d = z - base
    e = tl.where(factor == 0, 0.0, tl.exp(d))
    if CRITERION == "entropy":
        grad = e * factor * (d - u_over_s)
        nothing = e == 0
    else:
        factors = tl.where(z == float("-inf"), 0.0, factor)
        grad = tl.where(offs_v == y, e - s_sum, e) * factors
        nothing = factors == 0
    if SOFTCAP is not None:
        grad *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
    grad = tl.where(nothing, 0.0, grad).to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + offs_v, grad, mask=offs_v < V)
    else:
        tl.store(grad_ptr + offs_v, grad)


@jit
def _rows_kernel(
    z_ptr, grad_ptr, row_scale_ptr, key_ptr, value_ptr, stride_zt, stride_gt, V, seed,
    CRITERION: tl.constexpr, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    WRITE_GRAD: tl.constexpr, BLOCK_V: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zt
    offs_v = tl.arange(0, BLOCK_V)
    # Whole steps need no mask, which would split 16-byte loads where V is odd.
    whole = V // BLOCK_V * BLOCK_V
    y = -1
    if CRITERION == "cross_entropy":
        label = tl.load(key_ptr + row)
        unlabelled = label == -100  # IGNORED_LABEL
        wrong = (label != -100) & ((label < 0) | (label >= V))
        y = tl.where(unlabelled | wrong, 0, label).to(tl.int32)
        # Before the reductions below, at which the program's threads meet, and so before any of
        # them overwrites it.
        z_y = _load_logits(z_ptr, y, V, SOFTCAP, LOGIT_SCALE, False)

    m = -float("inf")
    s = tl.zeros([STEPS if CRITERION == "fisher" else BLOCK_V], tl.float32)
    u = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        z = _load_logits(z_ptr, start + offs_v, V, SOFTCAP, LOGIT_SCALE, False)
        m, s, u = _add_to_sums(z, start, m, s, u, CRITERION, BLOCK_V)
    if whole < V:
        z = _load_logits(z_ptr, whole + offs_v, V, SOFTCAP, LOGIT_SCALE, True)
        m, s, u = _add_to_sums(z, whole, m, s, u, CRITERION, BLOCK_V)
    nothing = m == float("-inf")
    base = tl.where(nothing, 0.0, m)
    s_sum = tl.where(nothing, 1.0, tl.sum(s, axis=0))
    u_over_s = 0.0
    if CRITERION == "entropy":
        u_over_s = tl.sum(u, axis=0) / s_sum
        value = tl.log(s_sum) - u_over_s
    else:
        if CRITERION == "fisher":
            target = uniform_fp32(tl.load(key_ptr + row), seed) * s_sum
            y, z_y = _sample(z_ptr, V, base, s, target, SOFTCAP, LOGIT_SCALE, BLOCK_V, STEPS)
            unlabelled = nothing
        else:
            s_sum = tl.where(wrong, float("nan"), s_sum)
        value = tl.where(unlabelled, 0.0, tl.log(s_sum) - (z_y - base))
    tl.store(value_ptr + row, value)

    if WRITE_GRAD:
        grad_ptr += row * stride_gt
        row_scale = tl.load(row_scale_ptr + row)
        # 0, and not NaN, where row_scale is 0 and the row holds NaN.
        if CRITERION == "entropy":
            factor = tl.where(row_scale == 0, 0.0, -LOGIT_SCALE * row_scale / s_sum)
        else:
            nothing = (row_scale == 0) | unlabelled
            factor = tl.where(nothing, 0.0, LOGIT_SCALE * row_scale / s_sum)
        # Backwards, so that what was read last, and is still in the cache, is read first.
        if whole < V:
            _store_grad(
                z_ptr, grad_ptr, whole + offs_v, V, base, s_sum, u_over_s, y, factor,
                CRITERION, SOFTCAP, LOGIT_SCALE, True,
            )  # fmt: skip
        for done in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
            _store_grad(
                z_ptr, grad_ptr, whole - BLOCK_V - done + offs_v, V, base, s_sum, u_over_s, y,
                factor, CRITERION, SOFTCAP, LOGIT_SCALE, False,
            )  # fmt: skip


def _rows_triton(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, criterion: Criterion,
    softcap: float | None, logit_scale: float,
) -> Tensor:  # fmt: skip
    values = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    config = configuration(_CONFIGS, logits.device)
    steps = cdiv(logits.shape[1], config["BLOCK_V"])
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
        SOFTCAP=softcap,
        LOGIT_SCALE=logit_scale,
        WRITE_GRAD=grad is not None,
        STEPS=1 << (steps - 1).bit_length() if sampled else 1,
        **config,
    )
    return values


def _rows_torch(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, criterion: Criterion,
    softcap: float | None, logit_scale: float,
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    keys = criterion.keys
    if keys is not None and criterion.name == "fisher":
        keys = uniform(keys, criterion.seed, dtype)
    rows = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        z, slope = logits[block], None
        if logit_scale != 1:
            z = z.to(dtype) * logit_scale
        if softcap is not None:
            tanh = (z.to(dtype) / softcap).tanh_()
            slope = tanh.square().neg_().add_(1)
            z = tanh.mul_(softcap).masked_fill_(z == -torch.inf, -torch.inf)
        base = z.amax(dim=1, keepdim=True).to(dtype)
        # A row of only -inf would make -inf - -inf; with 0 in its place every exp is 0 below.
        d = z - base.masked_fill_(base == -torch.inf, 0)
        e = d.exp()
        # At least 1, the maximum's own term, but for a row of only -inf.
        s = e.sum(dim=1, keepdim=True).clamp_(min=1)
        scale = None if row_scale is None else logit_scale * row_scale[block, None]
        if keys is None:
            # The smallest finite number for -inf, so that d · exp(d) is 0 where exp(d) is.
            d.clamp_(min=torch.finfo(dtype).min)
            u_over_s = torch.linalg.vecdot(e, d).unsqueeze(1) / s
            values[block] = (s.log() - u_over_s).squeeze(1)
        else:
            if criterion.name == "fisher":
                y, counts = _sampled(e, keys[block, None] * s)
            else:
                y, counts, s = _labelled(keys[block, None], s, e.shape[1])
            d_y = d.gather(1, y)
            values[block] = torch.where(counts, s.log() - d_y, 0).squeeze(1)
            if scale is not None:
                scale = torch.where(counts, scale, 0)
                # Not from a masked entry, which has no gradient.
                e.scatter_(1, y, e.gather(1, y) - torch.where(d_y == -torch.inf, 0, s))
        if grad is not None and scale is not None:
            e *= (-scale if keys is None else scale) / s
            if slope is not None:
                e *= slope
            if keys is None:
                e.mul_(d.sub_(u_over_s))
            grad[block] = e.masked_fill_(scale == 0, 0)
    return values


def _sampled(e: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (T, 1) samples as the kernel draws them, and whether there was anything to draw."""
    possible = e != 0  # NaN is no reason to count for nothing
    reached = (e.cumsum(dim=1) > target).logical_and_(possible)
    y = reached.view(torch.uint8).argmax(dim=1, keepdim=True)  # the first of the largest
    last = e.shape[1] - 1 - possible.flip(1).view(torch.uint8).argmax(dim=1, keepdim=True)
    y = torch.where(reached.any(dim=1, keepdim=True), y, last)
    return y, possible.any(dim=1, keepdim=True)


def _labelled(labels: Tensor, s: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an entry of each row, whether it counts, and s, which is NaN for a wrong label."""
    y = labels.clamp(0, vocab - 1)
    counts = labels != IGNORED_LABEL
    return y, counts, s.masked_fill((y != labels) & counts, torch.nan)


def judge_rows(
    logits: Tensor,
    row_scale: Tensor | None = None,
    grad: Tensor | None = None,
    criterion: Criterion = ENTROPY,
    *,
    softcap: float | None,
    logit_scale: float,
    backend: str | None,
) -> Tensor:
    """Return each row's value; with row_scale, write row_scale · dvalue/dlogits to grad.

    For the operations of this package: arguments are not checked, grad may be the logits, and of
    another dtype if it is not. A label that is neither an entry nor -100 makes its row NaN.
    """
    rows = _rows_triton if resolve_backend(backend, logits) == "triton" else _rows_torch
    maths_dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[0], dtype=maths_dtype)
    if row_scale is not None:
        row_scale = row_scale.to(maths_dtype).contiguous()
    if criterion.keys is not None:
        criterion = replace(criterion, keys=criterion.keys.contiguous())
    with undisturbed(logits):
        return rows(logits, row_scale, grad, criterion, softcap, logit_scale)
