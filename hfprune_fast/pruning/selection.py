"""Importance and a budget -> the neurons to keep.

An allocation says how many neurons of a budget each layer gets:

    uniform    all the same
    global     one ranking across layers
    a number   between the two, 1 is global, and 0 uniform but for the steps that the sum takes

In every allocation but uniform the same number of neurons is kept in all. Protected layers keep all
of theirs, on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.config import BUDGETS, Budget
from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.models.size_text import widths_text
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.experts import ExpertBudget
from hfprune_fast.pruning.widths import step_of
from hfprune_fast.scoring.table import ImportanceTable

# {layer: sorted (width,) int64 indices}, and of a model with experts {(layer, expert): ...}.
Keep = Mapping[Any, Tensor]


@keyword_options(budget=Budget)
def select(
    table: ImportanceTable,
    *,
    criterion: str | None = None,
    statistic: str | None = None,
    allocation: str | float = "uniform",
    budget: Budget,
) -> dict[Any, Tensor]:
    """Return the neurons to keep: {layer: sorted (width,) int64 indices}.

    Of a model with experts, `layer` is the layer's own MLP, such as a shared expert, and there is
    an entry (layer, expert) for each expert that stays; see `pruning.experts`.

    Args:
        criterion: which of the table's; by default the first.
        statistic: "l1" (the paper's), "l2", "fisher_mask", "act" or "obs"; by default the
            criterion's own.
        allocation: "uniform", "global" or a number between 0 (uniform, but for one step) and 1.

    Raises:
        ArgumentError: not exactly one budget, one out of range, or one that cannot be reached; an
            unknown allocation, layer, criterion or statistic.

    Of equally important neurons the one with the lower index is kept. Widths are multiples of
    `round_to`, and none is wider than dense. A uniform width is the multiple nearest to what was
    requested; otherwise all widths together are.
    """
    if not isinstance(table, ImportanceTable):
        raise ArgumentError(
            f"table must be the ImportanceTable that hf.score returns, got a {type(table).__name__}"
        )
    widths = budget_of(table.model, budget)
    if isinstance(widths, ExpertBudget):
        if allocation != "uniform":
            raise ArgumentError(
                f"allocation must be uniform, as a model with experts has one width, got "
                f"{shown(allocation)}"
            )
        return widths.keep(table, statistic, criterion)
    return widths.keep(table.importance(statistic, criterion), allocation)


def budget_of(spec: ModelSpec, budget: Budget) -> WidthBudget | ExpertBudget:
    """Return a model's budget; ArgumentError where no table of scores could meet it."""
    if spec.experts:
        return ExpertBudget.of(spec, budget)
    for name in budget.of_experts:
        raise ArgumentError(f"{name} is for models with experts, and this one has none")
    return WidthBudget.of(spec, budget)


@dataclass(frozen=True)
class WidthBudget:
    """A budget as the mean width of the layers that are pruned, in multiples of a step."""

    mean: float
    step: int = 1
    min_keep: float = Budget.min_keep
    protect: Collection[int] = ()

    @classmethod
    def of(cls, spec: ModelSpec, budget: Budget) -> WidthBudget:
        """Return a model's budget; ArgumentError where no table of scores could meet it."""
        _check_layers(budget.protect, spec.num_layers)
        _check_min_keep(budget.min_keep)
        mean = mean_width(spec, budget)
        step = step_of(budget, spec.intermediate_size)
        if step > spec.intermediate_size and mean != spec.intermediate_size:
            raise ArgumentError(
                f"round_to {step} is more than the dense width {spec.intermediate_size}"
            )
        return cls(mean, step, budget.min_keep, budget.protect)

    def keep(self, importance: Tensor, allocation: str | float) -> dict[int, Tensor]:
        """Return each layer's most important neurons, see `keep_top`."""
        return keep_top(
            importance, self.mean, allocation, self.min_keep, self.protect, round_to=self.step
        )

    def sizes(self, spec: ModelSpec) -> tuple[list[int], None]:
        """Return what `ModelSpec.params_at` takes, with widths as `even_widths` has them."""
        return self.even_widths(spec), None

    def even_widths(self, spec: ModelSpec) -> list[int]:
        """Return widths of the same sum as those of any allocation but uniform, nearly equal."""
        layers, dense = spec.num_layers, spec.intermediate_size
        pruned = layers - len(set(self.protect))
        if self.mean == dense:
            return [dense] * layers
        each, more = divmod(_blocks(self.mean, pruned, dense // self.step, self.step), pruned)
        widths = iter([(each + (i < more)) * self.step for i in range(pruned)])
        return [dense if layer in self.protect else next(widths) for layer in range(layers)]


def keep_top(
    importance: Tensor,
    width: float,
    allocation: str | float = "uniform",
    min_keep: float = Budget.min_keep,
    protect: Collection[int] = (),
    round_to: int = 1,
) -> dict[int, Tensor]:
    """Return each layer's most important neurons of a (L, F) importance, ties by index."""
    layers, dense = importance.shape
    protected = _check_layers(protect, layers)
    pruned = [layer for layer in range(layers) if layer not in protected]
    allocated = _widths(importance[pruned], width, allocation, min_keep, round_to)
    widths = dict.fromkeys(protected, dense) | dict(zip(pruned, allocated, strict=True))
    order = importance.sort(dim=1, descending=True, stable=True).indices.cpu()
    return {layer: order[layer, : widths[layer]].sort().values for layer in range(layers)}


def _widths(
    importance: Tensor, mean: float, allocation: str | float, min_keep: float, step: int
) -> list[int]:
    """Return a width for each layer of a (L, F) importance: multiples of step, `mean` on average.

    Neurons are dealt in blocks of step, best first in each layer, so whole blocks are what the
    ranking compares.
    """
    layers, dense = importance.shape
    share = _as_number(allocation)
    _check_min_keep(min_keep)
    if mean == dense:  # nothing to remove, even if dense is not a multiple of step
        return [dense] * layers
    blocks = dense // step
    if allocation == "uniform":
        return [_blocks(mean, 1, blocks, step) * step] * layers
    total = _blocks(mean, layers, blocks, step)
    ranked = importance.sort(dim=1, descending=True).values[:, : blocks * step]
    worth = ranked.view(layers, blocks, step).mean(dim=2).cpu()
    least = min(total // layers, max(1, math.ceil(min_keep * dense / step)))
    first = torch.arange(blocks) < least
    order = worth.masked_fill(first, torch.inf).flatten().sort(descending=True, stable=True).indices
    dealt = torch.bincount(order[:total] // blocks, minlength=layers).double()
    shares = (1 - share) * total / layers + share * dealt
    counts = shares.floor().long()
    # What rounding down has left goes to the layers whose next block is worth most.
    following = worth.gather(1, counts.clamp(max=blocks - 1)[:, None])[:, 0]
    following[shares == counts] = -torch.inf
    missing = total - int(counts.sum())
    counts[following.sort(descending=True, stable=True).indices[:missing]] += 1
    return [int(count) * step for count in counts]


def _blocks(mean: float, layers: int, blocks: int, step: int) -> int:
    """Return how many blocks of step neurons so many layers keep: one a layer at least."""
    return min(max(math.floor(layers * mean / step + 0.5), layers), layers * blocks)


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


def _check_min_keep(min_keep: float) -> None:
    if not 0 <= min_keep <= 1:
        raise ArgumentError(f"min_keep must be in [0, 1], got {min_keep}")


def mean_width(spec: ModelSpec, budget: Budget) -> float:
    """Return the mean MLP width that a budget gives, before it is rounded to multiples."""
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
        return value
    if not 0 <= value < 1:
        raise ArgumentError(f"{name} must be in [0, 1), got {shown(value)}")
    if name == "prune_ratio":
        return dense * (1 - value)
    neurons_params = spec.num_layers * spec.params_per_neuron  # of one neuron in every layer
    limit = (dense - 1) * neurons_params / spec.total_params
    if value > limit:
        raise ArgumentError(
            f"param_ratio {value} cannot be reached: the MLPs hold at most {limit:.4f} of all "
            "parameters"
        )
    return dense - value * spec.total_params / neurons_params
