"""What every budget of widths obeys: multiples, layers that are spared, which neurons are kept."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor

from hfprune_fast.config import Budget
from hfprune_fast.errors import ArgumentError


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


def protected_layers(protect: Collection[int], layers: int) -> set[int]:
    """Return the layers that are not pruned; refuse any that the model lacks, and all of them."""
    for layer in protect:
        if not 0 <= layer < layers:
            raise ArgumentError(f"protect names layer {layer}; the model has 0..{layers - 1}")
    if len(set(protect)) == layers:
        raise ArgumentError("protect names every layer, so none is left to prune")
    return set(protect)


def most_important(importance: Tensor, count: int) -> Tensor:
    """Return the sorted indices of the highest of (F,) values, on the CPU; ties by index."""
    order = importance.sort(descending=True, stable=True).indices.cpu()
    return order[:count].sort().values
