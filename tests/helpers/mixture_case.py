"""A family's tiny model with experts, saved, with what the tests of every such family ask of it."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from criteria_truth import TRUTHS, drawn_token, mean_entropy
from experts_truth import Site, experts_scores, masked_logits, widths_of
from family_case import FamilyCase, Written, largest_error
from family_models import every_other, in_turn
from family_truth import Float64, own_logits
from mixture_configs import MIXTURES, E, Mixture
from torch import Tensor
from transformers import PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.config import STATISTICS
from hfprune_fast.scoring.table import ImportanceTable

# The routers and layouts that differ most; CI runs all.
FAST_MIXTURES = {"gpt_oss", "deepseek_v3"}


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


EVERY_MIXTURE = [f if f in FAST_MIXTURES else slow(f) for f in MIXTURES]
SOME_MIXTURES = every_other(MIXTURES, FAST_MIXTURES)
mixtures_in_turn = partial(in_turn, families=MIXTURES, fast=FAST_MIXTURES)
# What is removed: whole experts, neurons of experts, of the other MLPs, or some of each.
FORMS = ("dropped", "narrowed", "own", "all")
FORMS_IN_TURN = [
    *mixtures_in_turn(["all"]), *mixtures_in_turn(FORMS[:3], slow_ways=FORMS[:3])
]  # fmt: skip
KEPT_OF_EXPERT, KEPT_OF_OWN = 13, {40: 24, 28: 17}
OF_EXPERTS = ("expert_reap", "expert_count", "expert_mass")


class MixtureCase(FamilyCase):
    """A tiny model with experts in float64, and the folder it was saved to."""

    @property
    def tiny(self) -> Mixture:
        return MIXTURES[self.family]

    @property
    def widths(self) -> dict[Site, int]:
        return widths_of(self.tiny, self.model)

    @property
    def layers_with_experts(self) -> list[int]:
        return sorted({site[0] for site in self.widths if not isinstance(site, int)})

    @cached_property
    def experts_truth(self) -> dict[str, dict[Any, Any]]:
        losses = {"entropy": mean_entropy, "fisher": drawn_token}
        with Float64():
            return experts_scores(self.tiny, self.model, self.ids, losses)

    def keep_all(self) -> dict[Site, Tensor]:
        return {site: torch.arange(width) for site, width in self.widths.items()}

    def keep_of(self, form: str) -> dict[Site, Tensor]:
        """Return what a form keeps: numbers that differ from layer to layer, expert to expert."""
        generator = torch.Generator().manual_seed(3)

        def some(count: int, of: int) -> Tensor:
            return torch.randperm(of, generator=generator)[:count].sort().values

        keep = self.keep_all()
        for layer in self.layers_with_experts if form in ("dropped", "all") else ():
            groups = 2 if self.tiny.routing == "grouped" else 1
            kept = [some(self.tiny.kept // groups, E // groups) + E // groups * g for g in (0, 1)]
            stay = torch.cat(kept[:groups]).tolist()
            keep = {s: k for s, k in keep.items() if isinstance(s, int) or s[0] != layer} | {
                (layer, expert): keep[layer, expert] for expert in stay
            }
        for site, width in self.widths.items():
            if isinstance(site, int):
                count = self._kept_of_own(site, width, form)
            else:
                count = KEPT_OF_EXPERT if form in ("narrowed", "all") else width
            if site in keep and count < width:
                keep[site] = some(count, width)
        return keep

    def _kept_of_own(self, layer: int, width: int, form: str) -> int:
        shared = self.tiny.overrides.get("n_shared_experts", 0)
        if shared and layer in self.layers_with_experts:  # config.json has a number of experts
            return shared * KEPT_OF_EXPERT if form in ("narrowed", "all") else width
        return KEPT_OF_OWN[width] if form in ("own", "all") else width

    def written(self, layout: str) -> Written:
        """Write a checkpoint pruned by one of FORMS, once."""
        if layout not in self._written:
            keep, folder = self.keep_of(layout), self.folder.parent / layout
            hf.prune_checkpoint(self.folder, folder, keep, verify=True)
            self._written[layout] = Written(folder, keep)
        return self._written[layout]

    def pruned_error(self, model: PreTrainedModel, keep: dict[Site, Tensor]) -> float:
        """Return how far a pruned model's logits are from the masked dense model's."""
        with Float64(), torch.no_grad():
            got = [own_logits(model, ids) for ids in self.ids]
        return largest_error(got, self.masked(keep))

    def masked(self, keep: dict[Site, Tensor]) -> list[Tensor]:
        with Float64():
            return [masked_logits(self.tiny, self.model, keep, ids) for ids in self.ids]

    def is_cut(self, name: str) -> bool:
        """Whether a stored tensor may be cut: of a router, experts or an MLP of the text."""
        below = name.rpartition("layers.")[2].partition(".")[2]
        parts = ("mlp.", "block_sparse_moe.", "experts.", "router.")
        return below.startswith(parts) and "vi" not in name


def expert_errors(table: ImportanceTable, truth: dict[str, dict[Any, Any]]) -> dict[str, float]:
    """Return the largest error of every statistic of a table, of neurons and of experts."""
    errors: dict[str, float] = {}
    for criterion in truth.keys() - {"experts"}:
        of_criterion = truth[criterion]
        for statistic in STATISTICS:
            name = statistic if statistic == "act" else f"{criterion}.{statistic}"
            errors[name] = site_error(table, name, of_criterion[statistic])
        name = f"{criterion}.expert_taylor"
        errors[name] = largest_error(table.experts(name), of_criterion["expert_taylor"])
        name = TRUTHS[criterion][1]
        errors[name] = abs(table.provenance[name] / float(of_criterion["loss"].mean()) - 1)
    for name in OF_EXPERTS:
        errors[name] = largest_error(table.experts(name), truth["experts"][name])
    return errors


def site_error(table: ImportanceTable, name: str, truth: dict[Site, Tensor]) -> float:
    assert set(table.sites) == set(truth)
    got: Sequence[Tensor] = [table.of(name, site) for site in truth]
    return largest_error(got, list(truth.values()))
