"""Importance and a budget -> the neurons to keep.

An allocation says how many neurons of a budget each layer gets:

    uniform    all the same
    global     one ranking across layers
    a number   between the two, 0 is uniform and 1 global

In every allocation of a budget the same number of neurons is kept in all. Protected layers keep all
of theirs, on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.config import BUDGETS, Budget, keyword_options
from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.models.spec import ModelSpec, widths_text
from hfprune_fast.scoring.table import ImportanceTable

Keep = Mapping[int, Tensor]  # {layer: sorted (width,) int64 indices}


@keyword_options(budget=Budget)
def select(
    table: ImportanceTable,
    *,
    criterion: str | None = None,
    statistic: str | None = None,
    allocation: str | float = "uniform",
    budget: Budget,
) -> dict[int, Tensor]:
    """Return the neurons to keep: {layer: sorted (width,) int64 indices}.

    Args:
        criterion: which of the table's; by default the first.
        statistic: "l1" (the paper's), "l2", "fisher_mask", "act" or "obs"; by default the
            criterion's own.
        allocation: "uniform", "global" or a number between 0 (uniform) and 1 (global).

    Raises:
        ArgumentError: not exactly one budget, one out of range, or one that cannot be reached; an
            unknown allocation, layer, criterion or statistic.

    Of equally important neurons the one with the lower index is kept. With `round_to`, the mean of
    the widths is the multiple nearest to what was requested, and none is wider than dense.
    """
    if not isinstance(table, ImportanceTable):
        raise ArgumentError(
            f"table must be the ImportanceTable that hf.score returns, got a {type(table).__name__}"
        )
    width = WidthBudget.of(table.model, budget)
    return width.keep(table.importance(statistic, criterion), allocation)


@dataclass(frozen=True)
class WidthBudget:
    """A budget as the mean width of the layers that are pruned."""

    width: int
    min_keep: float = Budget.min_keep
    protect: Collection[int] = ()
    round_to: int = 1

    @classmethod
    def of(cls, spec: ModelSpec, budget: Budget) -> WidthBudget:
        return cls(target_width(spec, budget), budget.min_keep, budget.protect, budget.round_to)

    def keep(self, importance: Tensor, allocation: str | float) -> dict[int, Tensor]:
        """Return each layer's most important neurons, see `keep_top`."""
        return keep_top(importance, allocation=allocation, **vars(self))


def keep_top(
    importance: Tensor,
    width: int,
    allocation: str | float = "uniform",
    min_keep: float = Budget.min_keep,
    protect: Collection[int] = (),
    round_to: int = 1,
) -> dict[int, Tensor]:
    """Return each layer's most important neurons of a (L, F) importance, ties by index."""
    layers, dense = importance.shape
    protected = _check_layers(protect, layers)
    pruned = [layer for layer in range(layers) if layer not in protected]
    allocated = _widths(importance[pruned], width, _as_number(allocation), min_keep, round_to)
    widths = dict.fromkeys(protected, dense) | dict(zip(pruned, allocated, strict=True))
    order = importance.sort(dim=1, descending=True, stable=True).indices.cpu()
    return {layer: order[layer, : widths[layer]].sort().values for layer in range(layers)}


def _widths(
    importance: Tensor, width: int, allocation: float, min_keep: float, step: int
) -> list[int]:
    """Return a width for each layer of a (L, F) importance: multiples of step, `width` on average.

    Neurons are dealt in blocks of step, best first in each layer, so whole blocks are what the
    ranking compares.
    """
    layers, dense = importance.shape
    if allocation == 0 or width == dense:
        return [width] * layers
    blocks, mean = dense // step, width // step
    ranked = importance.sort(dim=1, descending=True).values[:, : blocks * step]
    worth = ranked.view(layers, blocks, step).mean(dim=2)
    least = min(mean, max(1, math.ceil(min_keep * dense / step)))
    worth[:, :least] = torch.inf
    order = worth.flatten().sort(descending=True, stable=True).indices[: layers * mean]
    dealt = torch.bincount(order // blocks, minlength=layers).double()
    shares = mean + allocation * (dealt - mean)
    # Rounded down, and what is missing then goes to the largest remainders.
    counts = shares.floor().long()
    missing = layers * mean - int(counts.sum())
    counts[(shares - counts).sort(descending=True, stable=True).indices[:missing]] += 1
    return [int(count) * step for count in counts]


def _as_number(allocation: str | float) -> float:
    number = {"uniform": 0.0, "global": 1.0}.get(str(allocation), allocation)
    if not isinstance(number, int | float) or not 0 <= number <= 1:
        raise ArgumentError(
            f"allocation must be uniform, global or a number in [0, 1], got {allocation!r}"
        )
    return float(number)


def _check_layers(protect: Collection[int], layers: int) -> set[int]:
    for layer in protect:
        if not 0 <= layer < layers:
            raise ArgumentError(f"protect names layer {layer}; the model has 0..{layers - 1}")
    if len(set(protect)) == layers:
        raise ArgumentError("protect names every layer, so none is left to prune")
    return set(protect)


def target_width(spec: ModelSpec, budget: Budget) -> int:
    """Return the MLP width that a budget gives, the nearest multiple of round_to."""
    dense = spec.intermediate_size
    if spec.mlp_widths is not None:
        raise ArgumentError(
            f"the model's layers have {widths_text(spec.mlp_widths)} MLP neurons, and neurons are "
            "chosen only where all have as many; give prune_checkpoint a keep of your own"
        )
    if len(budget.size) != 1:
        got = " and ".join(budget.size) or "none"
        raise ArgumentError(f"give exactly one of {', '.join(BUDGETS)}; got {got}")
    ((name, value),) = budget.size.items()
    if name == "intermediate_size":
        if not isinstance(value, int) or not 1 <= value <= dense:
            raise ArgumentError(
                f"intermediate_size must be in 1..{dense} (the dense width), got {shown(value)}"
            )
        return _round(value, dense, budget.round_to)
    if not 0 <= value < 1:
        raise ArgumentError(f"{name} must be in [0, 1), got {shown(value)}")
    if name == "prune_ratio":
        return _round(dense * (1 - value), dense, budget.round_to)
    neurons_params = spec.num_layers * spec.params_per_neuron  # of one neuron in every layer
    limit = (dense - 1) * neurons_params / spec.total_params
    if value > limit:
        raise ArgumentError(
            f"param_ratio {value} cannot be reached: the MLPs hold at most {limit:.4f} of all "
            "parameters"
        )
    return _round(dense - value * spec.total_params / neurons_params, dense, budget.round_to)


def _round(exact: float, dense: int, step: int) -> int:
    if exact == dense:  # nothing to remove, even if dense is not a multiple of step
        return dense
    if step > dense:
        raise ArgumentError(f"round_to {step} is more than the dense width {dense}")
    nearest = math.floor(exact / step + 0.5) * step
    return min(max(nearest, step), dense // step * step)
