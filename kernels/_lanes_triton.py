"""What the Triton kernels of rows of logits share: tiles of lanes, their transform and exponents.

A tile is (LANES, WIDTH) logits, a lane in one thread: 16 bytes of a row, so that what runs along a
lane exchanges nothing between threads. Exponents are of 2: with FACTOR = log2 e · logit_scale, or
log2 e · softcap of what tanh gives, exp(z - max) is 2^(FACTOR · z - base), one fused
multiply-add and one instruction. `base` is FACTOR · max as rounded, or where that is lower, as in a
lane without a finite logit, -3e38: always finite, so that nothing is -inf - -inf.
"""

from __future__ import annotations

from hfprune_fast.kernels._triton import jit, tl

LOG2_E = 1.4426950408889634


def exponent_factor(softcap: float | None, logit_scale: float) -> float:
    """Return FACTOR."""
    return LOG2_E * (logit_scale if softcap is None else softcap)


@jit
def transformed(z, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """Return logits z in fp32, or under a cap tanh(LOGIT_SCALE · z / SOFTCAP); -inf stays."""
    z = z.to(tl.float32)
    if SOFTCAP is not None:
        if LOGIT_SCALE != 1.0:
            z *= LOGIT_SCALE
        z = tl.where(z == float("-inf"), z, _tanh(z * (1 / SOFTCAP)))
    return z


@jit
def _tanh(x):
    """Return tanh(x) to a few ulp; near 0, where 1 - exp(-2x) cancels, by its series."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@jit
def raised(z, m, base, FACTOR: tl.constexpr, LOWEST: tl.constexpr):
    """Return (m, base, delta, d): of lanes with logits z added, and each logit's exponent d.

    delta, at least LOWEST, is what the exponents of the sums so far change by.
    """
    m = tl.maximum(m, tl.max(z, axis=1))
    new_base = tl.maximum(m * FACTOR, -3e38)
    return m, new_base, tl.maximum(base - new_base, LOWEST), z * FACTOR - new_base[:, None]
