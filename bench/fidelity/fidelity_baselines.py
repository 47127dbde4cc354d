"""Other authors' methods on the calibration windows of a seed, for `fidelity_subject.py`.

What they compute is in bench/baselines; here each gives the neurons that a variant keeps, at the
same number of neurons removed as every other variant, and the weights or biases that go with them.
"""

from __future__ import annotations

import copy
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import activations
import flap
import grail
import weight_taylor
from fidelity_variants import Variant
from torch import Tensor
from transformers import PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.config import Budget
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.selection import WidthBudget

Keep = dict[int, Tensor]


class Correction(NamedTuple):
    """What replaces, or is added to, the down_proj of each pruned layer."""

    weights: dict[int, Tensor] | None = None
    biases: dict[int, Tensor] | None = None


def width_budget(spec: ModelSpec, ratio: float, **options: Any) -> WidthBudget:
    """Return a budget without rounding, so that all variants are of one size."""
    exact = round(spec.intermediate_size * (1 - ratio))
    return WidthBudget.of(spec, Budget(intermediate_size=exact, round_to=1, **options))


class Baselines:
    """A dense model and calibration ids (N, T), with what is shared by variants and ratios."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, ids: Tensor) -> None:
        self._model, self._spec, self._ids = model, spec, ids
        self._distilled = lru_cache(maxsize=None)(self._distillation)

    def keep(self, variant: Variant, ratio: float) -> Keep:
        """Return the neurons that a variant keeps."""
        if variant.criterion == "sdmprune":
            kept = self._budget(ratio).even_widths()[0]
            if kept >= self._light_width:
                return self._budget(ratio).keep(self._of_cross_entropy.of_each, "uniform")
            scores = self._distilled(*weight_taylor.published_settings(ratio))
            narrower = WidthBudget(kept, (self._light_width,) * self._spec.num_layers)
            again = narrower.keep(scores, "uniform")
            return {layer: self._light_keep[layer][rows] for layer, rows in again.items()}
        return self._budget(ratio).keep(self._scores(variant), variant.allocation)

    def correction(self, variant: Variant, keep: Keep) -> Correction:
        """Return what a variant does for the neurons that are gone."""
        if variant.correction == "bias":
            return Correction(biases=flap.compensating_bias(self._moments, self._down, keep))
        if variant.correction == "grail":
            return Correction(grail.reconstruct_from(self.grams, self._down, keep))
        if variant.correction == "grail, in turn":
            return Correction(grail.reconstruct_in_turn(self._model, self._ids, keep))
        return Correction()

    def _scores(self, variant: Variant) -> Tensor:
        if variant.criterion == "flap":
            return flap.flap(self._moments, self._down)
        if variant.criterion == "wanda_sp":
            return flap.wanda_sp(self._moments, self._down)
        return self._of_cross_entropy.of_sums

    def _budget(self, ratio: float) -> WidthBudget:
        # No floor: a threshold over all layers is what FLAP has.
        return width_budget(self._spec, ratio, min_keep=0.0)

    @cached_property
    def _down(self) -> list[Tensor]:
        return [mlp.down.weight.detach() for mlp in activations.gated_mlps(self._model)]

    @cached_property
    def _moments(self) -> activations.Moments:
        return activations.moments(self._model, self._ids)

    @cached_property
    def grams(self) -> list[Tensor]:
        return activations.grams(self._model, self._ids)

    @cached_property
    def _of_cross_entropy(self) -> weight_taylor.Importance:
        return weight_taylor.importance(self._model, self._ids)

    @cached_property
    def _light_keep(self) -> Keep:
        return self._budget(weight_taylor.LIGHT_CUT).keep(self._of_cross_entropy.of_each, "uniform")

    @property
    def _light_width(self) -> int:
        return self._budget(weight_taylor.LIGHT_CUT).even_widths()[0]

    def _distillation(self, alpha: float, temperature: float) -> Tensor:
        once = copy.deepcopy(self._model)
        hf.prune(once, self._light_keep)
        loss = weight_taylor.self_distillation(self._model, alpha, temperature)
        return weight_taylor.importance(once, self._ids, loss).of_each
