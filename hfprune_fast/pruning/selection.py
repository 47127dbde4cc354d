"""Importance and a budget -> the neurons to keep.

An allocation says how many neurons of a budget each layer gets:

    uniform    all the same; where dense layers differ in width, the same fraction of each
    global     one ranking across layers
    a number   between the two, 1 is global, and 0 uniform but for the steps that the sum takes

In every allocation but uniform the same number of neurons is kept in all. Protected layers keep all
of theirs, on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.config import BUDGETS, Budget
from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.experts import ExpertBudget
from hfprune_fast.pruning.widths import most_important, protected_layers, step_of
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
    """A budget as the mean width that every layer would have without `protect`.

    Args:
        mean: what is kept of all layers' neurons together, divided by the number of layers.
        dense: the neurons of each layer.
        step: widths are multiples of it; layers that are narrower stay as they are.
    """

    mean: float
    dense: tuple[int, ...]
    step: int = 1
    min_keep: float = Budget.min_keep
    protect: Collection[int] = ()

    @classmethod
    def of(cls, spec: ModelSpec, budget: Budget) -> WidthBudget:
        """Return a model's budget; ArgumentError where no table of scores could meet it."""
        protected_layers(budget.protect, spec.num_layers)
        mean = mean_width(spec, budget)
        step = step_of(budget, spec.intermediate_size)
        if step > spec.intermediate_size and mean != spec.mean_width:
            raise ArgumentError(
                f"round_to {step} is more than the dense width {spec.intermediate_size}"
            )
        return cls(mean, spec.widths, step, budget.min_keep, budget.protect)

    @property
    def ratio(self) -> float:
        """The fraction of the neurons that is removed where no layer is protected."""
        return 1 - self.mean * len(self.dense) / sum(self.dense)

    def keep(
        self,
        importance: Sequence[Tensor] | Tensor,
        allocation: str | float = "uniform",
        factors: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Return each layer's most important neurons, ties by index.

        Args:
            importance: of each layer, (F,) or longer.
            factors: (L,); layers are compared by importance times these.
        """
        rows = [row[:width] for row, width in zip(importance, self.dense, strict=True)]
        compared = rows
        if factors is not None:
            compared = [row * factor for row, factor in zip(rows, factors, strict=True)]
        kept = zip(rows, self._widths(compared, allocation), strict=True)
        return {layer: most_important(row, width) for layer, (row, width) in enumerate(kept)}

    def sizes(self, spec: ModelSpec) -> tuple[list[int], None]:
        """Return what `ModelSpec.params_at` takes, with widths as `even_widths` has them."""
        return self.even_widths(), None

    def even_widths(self) -> list[int]:
        """Return widths of the same sum as those of any allocation but uniform, nearly even."""
        return self._widths([torch.zeros(width) for width in self.dense], 0.0)

    def _widths(self, importance: Sequence[Tensor], allocation: str | float) -> list[int]:
        """Return a width for each layer; those protected, or narrower than a step, stay."""
        widths, step = list(self.dense), self.step
        protected = protected_layers(self.protect, len(widths))
        share, of_mean = _as_number(allocation), sum(widths) / len(widths)
        if self.mean == of_mean:  # nothing to remove, even if widths are not multiples of step
            return widths
        pruned = [
            layer for layer, width in enumerate(widths) if layer not in protected and width >= step
        ]
        of_pruned = [widths[layer] for layer in pruned]
        targets = [self.mean * (width / of_mean) for width in of_pruned]
        if allocation == "uniform":
            blocks = [
                _blocks(target, 1, width // step, step)
                for target, width in zip(targets, of_pruned, strict=True)
            ]
        else:
            most = sum(width // step for width in of_pruned)
            total = _blocks(math.fsum(targets), len(pruned), most, step)
            compared = [importance[layer] for layer in pruned]
            blocks = _dealt(compared, total, share, self.min_keep, step)
        for layer, count in zip(pruned, blocks, strict=True):
            widths[layer] = count * step
        return widths


def _dealt(
    importance: Sequence[Tensor], total: int, share: float, min_keep: float, step: int
) -> list[int]:
    """Return how many of `total` blocks of step neurons each layer gets.

    Neurons are dealt in blocks, best first in each layer, so whole blocks are what the ranking
    compares. At a share of 0 each layer gets as large a part of its neurons.
    """
    layers, widths = len(importance), torch.tensor([len(row) for row in importance])
    blocks = widths // step
    worth = [
        row.sort(descending=True).values[: count * step].view(count, step).mean(dim=1).cpu()
        for row, count in zip(importance, blocks.tolist(), strict=True)
    ]
    least = [
        min(total // layers, max(1, math.ceil(min_keep * width / step)), count)
        for width, count in zip(widths.tolist(), blocks.tolist(), strict=True)
    ]
    ranked = [row.clone() for row in worth]
    for of_layer, count in zip(ranked, least, strict=True):
        of_layer[:count] = torch.inf
    order = torch.cat(ranked).sort(descending=True, stable=True).indices
    owner = torch.arange(layers).repeat_interleave(blocks)
    dealt = torch.bincount(owner[order[:total]], minlength=layers).double()
    even = (1 - share) * total / layers * (widths / (widths.sum().double() / layers))
    shares = (even + share * dealt).clamp(min=1)
    counts = torch.minimum(shares.floor().long(), blocks).tolist()
    # What rounding has left goes to the layers whose next block is worth most, one to each that
    # was rounded down; what it took too much is taken where the last one is worth least.
    due = {layer for layer in range(layers) if float(shares[layer]) > counts[layer]}
    for _ in range(total - sum(counts)):
        has_room = [layer for layer in range(layers) if counts[layer] < len(worth[layer])]
        rounded = [layer for layer in has_room if layer in due]
        best = max(rounded or has_room, key=lambda layer: float(worth[layer][counts[layer]]))
        counts[best] += 1
        due.discard(best)
    for _ in range(sum(counts) - total):
        wide = [layer for layer in range(layers) if counts[layer] > 1]
        least_worth = min(wide, key=lambda layer: float(worth[layer][counts[layer] - 1]))
        counts[least_worth] -= 1
    return counts


def _blocks(neurons: float, least: int, most: int, step: int) -> int:
    """Return how many blocks of step neurons are nearest to so many neurons, within limits."""
    return min(max(math.floor(neurons / step + 0.5), least), most)


def _as_number(allocation: str | float) -> float:
    number = {"uniform": 0.0, "global": 1.0}.get(str(allocation), allocation)
    if not isinstance(number, int | float) or not 0 <= number <= 1:
        raise ArgumentError(
            f"allocation must be uniform, global or a number in [0, 1], got {allocation!r}"
        )
    return float(number)


def mean_width(spec: ModelSpec, budget: Budget) -> float:
    """Return the mean MLP width that a budget gives, before it is rounded to multiples."""
    dense = spec.mean_width
    if len(budget.size) != 1:
        got = " and ".join(budget.size) or "none"
        raise ArgumentError(f"give exactly one of {', '.join(BUDGETS)}; got {got}")
    ((name, value),) = budget.size.items()
    if name == "intermediate_size":
        if not isinstance(value, int) or not 1 <= value <= dense:
            of = "the dense width" if spec.mlp_widths is None else "the dense mean width"
            raise ArgumentError(
                f"intermediate_size must be in 1..{dense:g} ({of}), got {shown(value)}"
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
