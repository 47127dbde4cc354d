"""Neurons that a budget keeps of importances alone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hfprune_fast.pruning.selection import WidthBudget


def kept_of(
    importance: Sequence[Tensor] | Tensor, mean: float, allocation: str | float = "uniform",
    **budget: Any,
) -> dict[int, Tensor]:  # fmt: skip
    """Return the neurons kept at a mean width, of layers as wide as their importance."""
    dense = tuple(len(row) for row in importance)
    return WidthBudget(mean, dense, **budget).keep(importance, allocation)
