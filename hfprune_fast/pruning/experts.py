"""Models with experts: which experts stay, and which neurons of each.

config.json has one number of experts and one width of an expert for all layers, so every layer
keeps as many experts and every expert as many neurons, each its own. Experts are dropped first;
`prune_ratio` is of the neurons of what is left. The other MLPs have widths of their own: those of
layers without experts, and the shared experts, which see every token; all are narrowed by the same
ratio, each to multiples of what suits its width, experts to multiples of 8 at least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.config import EXPERT_SCORES, Budget
from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.models.sites import SiteKey
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.widths import most_important, protected_layers, step_of
from hfprune_fast.scoring.costs import TOKENS_A_NEURON
from hfprune_fast.scoring.table import DEFAULT_STATISTIC, ImportanceTable

# What torch's grouped products take, by which transformers runs experts: rows of 16 bytes.
_STEP_OF_EXPERTS = 8


@dataclass(frozen=True)
class ExpertBudget:
    """How many experts a layer keeps, and how many neurons each MLP.

    Args:
        experts: kept by every layer.
        widths: {site: neurons}, of each layer's own MLP, and of every expert of the dense model.
        score: what experts are ranked by, one of EXPERT_SCORES.
        groups: the experts of a layer are chosen from so many groups, which keep as many each.
        ratio: of the neurons of what is left, how many were to go.
    """

    experts: int
    widths: Mapping[SiteKey, int]
    score: str
    groups: int
    ratio: float

    @classmethod
    def of(cls, spec: ModelSpec, budget: Budget) -> ExpertBudget:
        """Return a model's budget; ArgumentError where no table of scores could meet it."""
        experts = _experts(spec, budget)
        ratio = _ratio(spec, budget, experts)
        dense = [layer for layer, count in enumerate(spec.experts) if not count]
        others = [layer for layer, count in enumerate(spec.experts) if count]
        protected = _protected(spec, budget, {"without": dense, "with": others})
        if others[0] in protected and experts < spec.num_experts:
            raise ArgumentError(
                "protect names the layers with experts, of which none can be dropped then"
            )
        of_experts = 0.0 if others[0] in protected else ratio
        expert_width = _width(spec.expert_width, of_experts, budget, _STEP_OF_EXPERTS)
        widths: dict[SiteKey, int] = {}
        for site, width in spec.sites.items():
            if not isinstance(site, int):
                widths[site] = expert_width
            elif site in protected:
                widths[site] = width
            elif site in others and spec.shared_is_multiple:
                widths[site] = width // spec.expert_width * expert_width
            else:
                widths[site] = _width(width, ratio, budget)
        return cls(experts, widths, budget.expert_score, spec.expert_groups, of_experts)

    def sizes(self, spec: ModelSpec) -> tuple[list[int], tuple[int, int]]:
        """Return what `ModelSpec.params_at` takes: each layer's width, and experts and theirs."""
        of_expert = next(width for site, width in self.widths.items() if isinstance(site, tuple))
        own = [self.widths.get(layer, 0) for layer in range(spec.num_layers)]
        return own, (self.experts, of_expert)

    def keep(
        self, table: ImportanceTable, statistic: str | None = None, criterion: str | None = None
    ) -> dict[SiteKey, Tensor]:
        """Return the neurons to keep, of each layer's own MLP and each expert that stays.

        Removal costs are ranked by where there are any: an expert that too few tokens chose has
        none, and its neurons are ranked by the criterion's default statistic.
        """
        criterion = criterion or table.criteria[0]
        stay = self._stay(table, criterion)
        importance = table.importance(statistic, criterion)
        fallback = None
        if statistic == "obs":
            fallback = table.importance(DEFAULT_STATISTIC[criterion], criterion)
        counts = iter(table.statistics.get("expert_count", torch.zeros(0)).tolist())
        keep: dict[SiteKey, Tensor] = {}
        for site, part in table.sites.items():
            ranked = importance[part]
            if isinstance(site, tuple):
                few = next(counts, torch.inf) < TOKENS_A_NEURON * len(ranked)
                ranked = fallback[part] if few and fallback is not None else ranked
                if site not in stay:
                    continue
            keep[site] = most_important(ranked, self.widths[site])
        return keep

    def _stay(self, table: ImportanceTable, criterion: str) -> set[SiteKey]:
        """Return (layer, expert) of the experts that stay: of each group the most important."""
        layers = [layer for layer, count in enumerate(table.model.experts) if count]
        if self.experts == table.model.num_experts:
            return {(layer, e) for layer in layers for e in range(self.experts)}
        scores = expert_importance(table, self.score, criterion)
        size, each = table.model.num_experts // self.groups, self.experts // self.groups
        by_group = scores.view(len(layers), self.groups, size)
        order = by_group.sort(dim=2, descending=True, stable=True).indices[:, :, :each]
        numbers = (order + size * torch.arange(self.groups)[:, None]).flatten(1)
        return {(layer, e) for layer, of in zip(layers, numbers.tolist(), strict=True) for e in of}


def expert_importance(table: ImportanceTable, score: str, criterion: str) -> Tensor:
    """Return (X, E) float64, higher = keep, of the X layers with experts.

    Raises:
        ArgumentError: the table has no such score of experts.
    """
    name = f"{criterion}.expert_taylor" if score == "taylor" else f"expert_{score}"
    if name not in table.statistics:
        raise ArgumentError(
            f"these scores have no {name}, by which experts are ranked: taylor needs a "
            f"gradient, {', '.join(EXPERT_SCORES[1:])} a text; score with one, or drop no experts"
        )
    return table.experts(name)


def _experts(spec: ModelSpec, budget: Budget) -> int:
    """Return how many experts a layer keeps."""
    dense, chosen, groups = spec.num_experts, spec.experts_per_token, spec.expert_groups
    if budget.experts is not None and budget.expert_ratio is not None:
        raise ArgumentError("give one of expert_ratio and experts, got both")
    kept, requested = dense, ""
    if budget.experts is not None:
        kept, requested = budget.experts, f"experts {budget.experts}"
    elif budget.expert_ratio is not None:
        if not 0 <= budget.expert_ratio < 1:
            raise ArgumentError(f"expert_ratio must be in [0, 1), got {budget.expert_ratio}")
        # A multiple of the groups, the nearest one.
        kept = math.floor(dense * (1 - budget.expert_ratio) / groups + 0.5) * groups
        requested = f"expert_ratio {budget.expert_ratio}"
    least = min(spec.least_experts, dense)
    if not least <= kept <= dense:
        raise ArgumentError(
            f"{requested} leaves {kept} experts a layer; expected {least}..{dense}, as {chosen} "
            f"are chosen a token{f' and there are {groups} groups' if groups > 1 else ''}"
        )
    if kept % groups:
        raise ArgumentError(
            f"{requested} leaves {kept} experts a layer, which their {groups} groups do not divide"
        )
    return kept


def _ratio(spec: ModelSpec, budget: Budget, experts: int) -> float:
    """Return the fraction of the neurons of what is left that is removed."""
    sizes = budget.size
    if len(sizes) > 1 or (not sizes and budget.experts is None and budget.expert_ratio is None):
        got = " and ".join(sizes) or "none"
        raise ArgumentError(
            "give one of prune_ratio, param_ratio and intermediate_size, or one of expert_ratio "
            f"and experts, or one of each; got {got}"
        )
    if not sizes:
        return 0.0
    ((name, value),) = sizes.items()
    if name == "intermediate_size":
        if not isinstance(value, int) or not 1 <= value <= spec.expert_width:
            raise ArgumentError(
                f"intermediate_size must be in 1..{spec.expert_width} (an expert's dense width), "
                f"got {shown(value)}"
            )
        return 1 - value / spec.expert_width
    if not 0 <= value < 1:
        raise ArgumentError(f"{name} must be in [0, 1), got {shown(value)}")
    if name == "prune_ratio":
        return float(value)
    dropped = sum(map(bool, spec.experts)) * (spec.num_experts - experts)
    of_expert = spec.expert_width * spec.expert_params_per_neuron
    gone = dropped * (of_expert + spec.params_per_expert)
    own = sum(spec.widths) * spec.params_per_neuron
    left = own + (sum(spec.experts) - dropped) * of_expert
    ratio = (value * spec.total_params - gone) / left
    if not 0 <= ratio < 1:
        raise ArgumentError(
            f"param_ratio {value} cannot be reached: with {experts} experts a layer "
            f"{gone / spec.total_params:.4f} of all parameters are gone, and the MLPs that are "
            f"left hold {left / spec.total_params:.4f}"
        )
    return ratio


def _protected(spec: ModelSpec, budget: Budget, kinds: Mapping[str, list[int]]) -> set[int]:
    """Return the layers that are not pruned: all of a kind, as one width is declared for these."""
    protected = protected_layers(budget.protect, spec.num_layers)
    for kind, layers in kinds.items():
        if protected & set(layers) and not protected >= set(layers):
            raise ArgumentError(
                f"protect names some of the layers {kind} experts, {layers}, whose sizes are one "
                "in config.json; name all of them or none"
            )
    return protected


def _width(dense: int, ratio: float, budget: Budget, least_step: int = 1) -> int:
    """Return the multiple nearest to what a ratio leaves of a width."""
    step = math.lcm(step_of(budget, dense), least_step)
    if ratio == 0:
        return dense
    if step > dense:
        raise ArgumentError(f"widths must be multiples of {step}, and an MLP has {dense} neurons")
    blocks = math.floor(dense * (1 - ratio) / step + 0.5)
    return min(max(blocks, 1) * step, dense)
