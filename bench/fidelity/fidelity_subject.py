"""A dense model and texts to measure pruned ones on, and what is scored with a seed."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import fidelity_mixture
from fidelity_baselines import Baselines, width_budget
from fidelity_generation import Continuations
from fidelity_variants import CRITERIA_OF_OTHERS, Variant
from torch import Tensor, nn
from transformers import PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import MEASURED_ALLOCATIONS, Budget, Recipe
from hfprune_fast.data.batches import MicroBatch, TokenData
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import ScoresFileError
from hfprune_fast.evaluation.fidelity import HeldOut
from hfprune_fast.models.sites import parts_of
from hfprune_fast.pruning import allocation
from hfprune_fast.pruning.refit import refit
from hfprune_fast.pruning.selection import Keep, WidthBudget
from hfprune_fast.scoring.data_free import data_free_table
from hfprune_fast.scoring.table import check_table

BATCH = 16
# Of models with experts the first two.
CRITERIA = ("entropy", "fisher", "cross_entropy", "self_distillation", "activation")


@dataclass(frozen=True)
class Pruning:
    """What is done to the dense model: the neurons kept, and what their down_proj become."""

    keep: Keep
    weights: Mapping[Any, Tensor] | None = None  # the dense model's if None
    biases: Mapping[int, Tensor] | None = None  # added to the output of each layer's down_proj
    unfitted: int | None = None  # experts that too few tokens chose
    cpu_seconds: float = 0.0  # to choose and refit, without scores and what else rows share


class Subject:
    """A dense model in fp32 and held-out windows, also of further texts.

    Greedy continuations are compared at the ratios of `generate`.
    """

    def __init__(
        self,
        source: ModelSource,
        held_out: TokenData,
        also: Mapping[str, TokenData] | None = None,
        generate: Collection[float] = (),
    ) -> None:
        self.source = source
        self.model = loading.load_model(source, dtype="float32", device="cpu")
        self.held_out = HeldOut(self.model, held_out.split(BATCH))
        self._also = {
            name: HeldOut(self.model, data.split(BATCH)) for name, data in (also or {}).items()
        }
        self._ids, self._generate = held_out.batches[0].ids, generate

    def pruned(self, pruning: Pruning) -> PreTrainedModel:
        smaller = copy.deepcopy(self.model)
        hf.prune(smaller, pruning.keep, down_proj=pruning.weights)
        for layer, bias in (pruning.biases or {}).items():
            down = parts_of(smaller).own_mlps[layer].down
            bias = bias.to(down.weight.dtype)
            down.bias = nn.Parameter(bias if down.bias is None else down.bias + bias)
        return smaller

    def measure(self, pruned: PreTrainedModel, ratio: float) -> dict[str, Any]:
        """Return the fields of a row that are measured on held-out text."""
        found: dict[str, Any] = asdict(self.held_out.measure(pruned))
        if self._also:
            found["also"] = {name: asdict(h.measure(pruned)) for name, h in self._also.items()}
        if ratio in self._generate:
            found["generated"] = self._continuations.compare(pruned)
        return found

    @cached_property
    def _continuations(self) -> Continuations:
        return Continuations(self.model, self._ids)


class Seed:
    """The calibration windows of a seed, and what was scored on them, once for all variants.

    Args:
        kept_at: how the files of scores begin that an interrupted run goes on from.
        criteria: to score by; by default all that a variant ranks by.
    """

    def __init__(
        self,
        subject: Subject,
        calibration: TokenData,
        seed: int,
        kept_at: Path | None = None,
        criteria: Sequence[str] | None = None,
    ) -> None:
        self.subject, self.seed = subject, seed
        self.calibration, self._kept_at, self._criteria = calibration, kept_at, criteria
        self.ids, self._batches = calibration.batches[0].ids, calibration.split(BATCH)

    def row(self, variant: Variant, ratio: float) -> dict[str, Any]:
        """Prune by a variant and measure what came of it."""
        return self.measured(variant, ratio, self.prune(variant, ratio))

    def measured(self, variant: Variant, ratio: float, pruning: Pruning) -> dict[str, Any]:
        """Return the row of a pruning."""
        spec = self.subject.source.spec
        widths = [len(pruning.keep.get(layer, ())) for layer in range(spec.num_layers)]
        experts, of_experts = None, {}
        if spec.experts:
            found = fidelity_mixture.sizes(variant, ratio, spec)
            assert found is not None
            experts = found.experts, found.width
            of_experts = {"experts": experts, "experts_not_refitted": pruning.unfitted}
        added = {}
        if pruning.biases:  # not in param_ratio, which is of the neurons alone
            added["bias_params"] = sum(map(len, pruning.biases.values()))
        return {
            **asdict(variant), "prune_ratio": ratio, "seed": self.seed, "widths": widths,
            **of_experts, "param_ratio": spec.pruned_to(widths, experts)["param_ratio"],
            **added, "cpu_seconds": pruning.cpu_seconds,
            **self.subject.measure(self.subject.pruned(pruning), ratio),
        }  # fmt: skip

    def prune(self, variant: Variant, ratio: float) -> Pruning:
        """Choose neurons and refit."""
        self._share(variant, ratio)
        begun = time.process_time()
        keep = self.keep(variant, ratio)
        found = Pruning(keep)
        if variant.refit:
            with ResidentModel(self.subject.model) as model:
                (fitted,), _ = refit(model, self._batches, [keep])
            found = Pruning(keep, fitted.weights, unfitted=fitted.unfitted)
        if variant.correction:
            found = Pruning(keep, *self._baselines.correction(variant, keep))
        return replace(found, cpu_seconds=time.process_time() - begun)

    def keep(self, variant: Variant, ratio: float) -> Keep:
        """Return the neurons that a variant keeps."""
        spec = self.subject.source.spec
        if spec.experts:
            return fidelity_mixture.keep(variant, ratio, self._table(variant), self.seed)
        if variant.criterion in CRITERIA_OF_OTHERS:
            return self._baselines.keep(variant, ratio)
        width = width_budget(spec, ratio)
        if variant.rounded:
            width = WidthBudget.of(spec, Budget(prune_ratio=ratio))
        importance = self._importance(variant)
        if variant.allocation not in MEASURED_ALLOCATIONS:
            return width.keep(importance, variant.allocation)
        recipe = Recipe(allocation=variant.allocation)
        with ResidentModel(self.subject.model) as model:
            return allocation.choose(model, self._batches, importance, width, recipe)[0]

    def _share(self, variant: Variant, ratio: float) -> None:
        """Make what rows of a seed share, so that it counts in the time of none."""
        if variant.allocation in MEASURED_ALLOCATIONS:
            variant = replace(variant, allocation="uniform")
        self.keep(variant, ratio)
        if variant.correction == "grail":
            _ = self._baselines.grams

    def _importance(self, variant: Variant) -> Tensor:
        if variant.criterion == "entropy, parity":
            return self._parity.importance("l1")
        return self._table(variant).importance(variant.statistic, variant.criterion)

    def _table(self, variant: Variant) -> hf.ImportanceTable:
        if variant.criterion in ("magnitude", "random"):
            return data_free_table(self.subject.source, variant.criterion, self.seed)
        return self.scores

    @cached_property
    def _baselines(self) -> Baselines:
        return Baselines(self.subject.model, self.subject.source.spec, self.ids)

    @cached_property
    def _parity(self) -> hf.ImportanceTable:
        return self._scored("parity", self.calibration.split(1), dtype="bfloat16", parity=True)

    @cached_property
    def scores(self) -> hf.ImportanceTable:
        has_experts = bool(self.subject.source.spec.experts)
        criteria = self._criteria or (CRITERIA[:2] if has_experts else CRITERIA)
        return self._scored("scores", self._batches, dtype="float32", criterion=criteria, obs=True)

    def _scored(self, name: str, batches: list[MicroBatch], **options: Any) -> hf.ImportanceTable:
        """Score, or read what an earlier run scored on the same windows with the same model."""
        source = self.subject.source
        file = self._kept_at and self._kept_at.with_name(f"{self._kept_at.name}-{name}.safetensors")
        if file and file.exists():
            table = hf.ImportanceTable.load(file)
            check_table(table, source)
            of_data = table.provenance.get("calibration", {}).get("data_sha256")
            of_seed = table.provenance.get("seed", self.seed)
            if (of_data, of_seed) != (self.calibration.sha256, self.seed):
                raise ScoresFileError(f"{file} has scores of other windows; give another --work")
            return table
        state = file and file.with_suffix(".state")
        table = hf.score(
            source, [batch.ids for batch in batches], device="cpu", seed=self.seed,
            state_file=state, resume=state is not None and state.exists(), **options,
        )  # fmt: skip
        if file:
            table.save(file)
            file.with_suffix(".state").unlink(missing_ok=True)
        return table
