"""A dense model and a text to measure pruned ones on, and what is scored with a seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import fidelity_mixture
from fidelity_baselines import Baselines
from fidelity_variants import CRITERIA_OF_OTHERS, Variant
from torch import Tensor, nn

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import ALLOCATIONS_TRIED, Budget
from hfprune_fast.data.batches import TokenData
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.evaluation import fidelity
from hfprune_fast.models.sites import parts_of
from hfprune_fast.pruning import allocation
from hfprune_fast.pruning.refit import refit
from hfprune_fast.pruning.selection import Keep, WidthBudget
from hfprune_fast.scoring.data_free import data_free_table

BATCH = 16


class Subject:
    """A dense model in fp32, held-out windows, and its hidden states over them."""

    def __init__(self, source: ModelSource, held_out: TokenData) -> None:
        self.source = source
        self.model = loading.load_model(source, dtype="float32", device="cpu")
        self._batches = held_out.split(BATCH)
        fidelity.check_windows(self._batches)
        with ResidentModel(self.model) as model:
            self._dense_hidden = list(model.final_hidden(self._batches))

    def measure(
        self,
        keep: Keep,
        fitted: Mapping[Any, Tensor] | None = None,
        biases: Mapping[int, Tensor] | None = None,
    ) -> fidelity.Fidelity:
        """Return the fidelity of a pruned model, with the dense weights unless others are given.

        `biases` are added to the output of each layer's down_proj.
        """
        smaller = copy.deepcopy(self.model)
        hf.prune(smaller, keep, down_proj=fitted)
        for layer, bias in (biases or {}).items():
            down = parts_of(smaller).own_mlps[layer].down
            bias = bias.to(down.weight.dtype)
            down.bias = nn.Parameter(bias if down.bias is None else down.bias + bias)
        with ResidentModel(smaller) as model:
            hidden, head = model.final_hidden(self._batches), model.head()
            return fidelity.compare(self._batches, self._dense_hidden, hidden, head, head)


class Seed:
    """The calibration windows of a seed, and what was scored on them, once for all variants."""

    def __init__(self, subject: Subject, calibration: TokenData, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self.ids, self._batches = calibration.batches[0].ids, calibration.split(BATCH)

    def rows(self, variant: Variant, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Measure a variant at all ratios, whose refits share the dense model's run."""
        keeps = [self.keep(variant, ratio) for ratio in ratios]
        fitted: list[Any] = [None] * len(keeps)
        if variant.refit:
            with ResidentModel(self.subject.model) as model:
                fitted = refit(model, self._batches, keeps)[0]
        spec = self.subject.source.spec
        for ratio, keep, result in zip(ratios, keeps, fitted, strict=True):
            widths = [len(keep.get(layer, ())) for layer in range(spec.num_layers)]
            experts, of_experts = None, {}
            if spec.experts:
                found = fidelity_mixture.sizes(variant, ratio, spec)
                assert found is not None
                experts = found.experts, found.width
                unfitted = None if result is None else result.unfitted
                of_experts = {"experts": experts, "experts_not_refitted": unfitted}
            weights, biases = result and result.weights, None
            if variant.correction:
                weights, biases = self._baselines.correction(variant, keep)
            measured = self.subject.measure(keep, weights, biases)
            # Not in param_ratio, which is of the neurons alone.
            added = {"bias_params": sum(map(len, biases.values()))} if biases else {}
            yield {
                **asdict(variant), "prune_ratio": ratio, "seed": self.seed, "widths": widths,
                **of_experts, "param_ratio": spec.pruned_to(widths, experts)["param_ratio"],
                **added, **asdict(measured),
            }  # fmt: skip

    def keep(self, variant: Variant, ratio: float) -> Keep:
        """Return the neurons that a variant keeps."""
        spec = self.subject.source.spec
        if spec.experts:
            return fidelity_mixture.keep(variant, ratio, self._table(variant), self.seed)
        if variant.criterion in CRITERIA_OF_OTHERS:
            return self._baselines.keep(variant, ratio)
        exact = round(spec.intermediate_size * (1 - ratio))  # so that all variants are of one size
        width = WidthBudget.of(spec, Budget(intermediate_size=exact, round_to=1))
        importance = self._importance(variant)
        if variant.allocation != "auto":
            return width.keep(importance, variant.allocation)
        keeps = [width.keep(importance, a) for a in ALLOCATIONS_TRIED.values()]
        with ResidentModel(self.subject.model) as model:
            kl = allocation.held_out_kl(model, allocation.trial(self._batches), keeps)
        return keeps[min(range(len(kl)), key=kl.__getitem__)]

    def _importance(self, variant: Variant) -> Tensor:
        if variant.criterion == "entropy, parity":
            return self._parity.importance("l1")
        return self._table(variant).importance(variant.statistic, variant.criterion)

    def _table(self, variant: Variant) -> hf.ImportanceTable:
        if variant.criterion in ("magnitude", "random"):
            return data_free_table(self.subject.source, variant.criterion, self.seed)
        return self._scores

    @cached_property
    def _baselines(self) -> Baselines:
        return Baselines(self.subject.model, self.subject.source.spec, self.ids)

    @cached_property
    def _parity(self) -> hf.ImportanceTable:
        bf16 = loading.load_model(self.subject.source, dtype="bfloat16", device="cpu")
        return hf.score(bf16, self.ids.split(1), parity=True)

    @cached_property
    def _scores(self) -> hf.ImportanceTable:
        every = ["entropy", "fisher"]
        if not self.subject.source.spec.experts:
            every += ["cross_entropy", "self_distillation", "activation"]
        batches = self.ids.split(BATCH)
        return hf.score(self.subject.model, batches, criterion=every, obs=True, seed=self.seed)
