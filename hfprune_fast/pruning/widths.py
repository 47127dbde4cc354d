"""What widths are made multiples of."""

from __future__ import annotations

import math

from hfprune_fast.config import Budget


def step_of(budget: Budget, dense: int) -> int:
    """Return what widths are multiples of.

    "auto" is 256, which K-quants need, from a dense width of 4096, 64 from 512 and 32 below, but
    at most an eighth of the width; a width that is named is kept as it is.
    """
    if budget.round_to != "auto":
        return int(budget.round_to)
    step = 256 if dense >= 4096 else 64 if dense >= 512 else 32
    while 8 * step > dense and step > 1:
        step //= 2
    return math.gcd(step, budget.intermediate_size or step)
