"""The ways to make a mixture of experts smaller that `fidelity.py` compares, all of one size.

At a ratio r, routed experts lose r of their neurons in all, whichever way: r of the experts are
dropped, or every expert is narrowed by r, or as many neurons go from all MLPs alike, shared experts
among them, or a quarter of the experts is dropped and all MLPs are narrowed to the same size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from fidelity_variants import Variant

from hfprune_fast.config import Budget
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.experts import ExpertBudget
from hfprune_fast.pruning.selection import Keep
from hfprune_fast.scoring.table import ImportanceTable

DROPPED_BEFORE = 0.25  # of the experts, where what is left is narrowed too
_STEP = 8  # of an expert's width


class Sizes(NamedTuple):
    experts: int
    width: int
    shared: int  # the layer's own MLP


def sizes(variant: Variant, ratio: float, spec: ModelSpec) -> Sizes | None:
    """Return what a variant keeps of each layer; None if it is another one at this ratio.

    Raises:
        ValueError: no whole number of experts, or of blocks of neurons, is this ratio.
    """
    count, width, shared = spec.num_experts, spec.expert_width, spec.intermediate_size
    left = round(count * (1 - ratio))
    if left != count * (1 - ratio) or width * (1 - ratio) % _STEP:
        raise ValueError(f"{ratio} of {count} experts of {width} neurons is no whole number")
    if not variant.criterion:
        return Sizes(left, width, shared)
    if variant.allocation == "experts":
        return Sizes(count, left * width // count, shared)
    total = left * width + shared
    if variant.dropped_by:
        if ratio <= DROPPED_BEFORE:
            return None
        count = round(count * (1 - DROPPED_BEFORE))
    narrowed = round(width * total / (count * width + shared) / _STEP) * _STEP
    found = Sizes(count, narrowed, total - count * narrowed)
    # Narrowed by so few neurons that a step of the experts' width is all of it.
    return None if found.shared >= shared else found


def keep(variant: Variant, ratio: float, table: ImportanceTable, seed: int) -> Keep:
    """Return what a variant keeps by these scores."""
    spec = table.model
    found = sizes(variant, ratio, spec)
    if found is None:
        raise ValueError(f"{variant} is another variant at {ratio}")
    widths = {site: found.shared if isinstance(site, int) else found.width for site in spec.sites}
    criterion, _, score = variant.dropped_by.rpartition(" ")
    experts = spec.num_experts if score in ("", "random") else found.experts
    requested = Budget(
        experts=experts, expert_score="count" if experts == spec.num_experts else score
    )
    budget = replace(ExpertBudget.of(spec, requested), widths=widths)
    kept = budget.keep(table, variant.statistic or None, variant.criterion or criterion or None)
    if score != "random":
        return kept
    generator = torch.Generator().manual_seed(seed)
    for layer, count in enumerate(spec.experts):
        for expert in torch.randperm(count, generator=generator)[found.experts :].tolist():
            del kept[layer, expert]
    return kept
