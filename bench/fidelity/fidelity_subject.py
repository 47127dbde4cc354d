"""A dense model and a text to measure pruned ones on, and what is scored with a seed.

A pruned model is the dense one with another down_proj: columns of removed neurons are zero, and the
others refitted or as they were. That is the same function as the smaller model, since a neuron
acts on nothing but through its column (a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fidelity_variants import Variant
from torch import Tensor, nn

import hfprune_fast as hf
from hfprune_fast.checkpoint import source
from hfprune_fast.evaluation import fidelity
from hfprune_fast.checkpoint import loading
from hfprune_fast.commands import pipeline
from hfprune_fast.pruning import allocation
from hfprune_fast.pruning import selection
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.data.batches import MicroBatch, micro_batch, numbered
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.pruning.refit import Keep, refit

BATCH = 16
Weights = Mapping[int, Tensor]  # {layer: (D, kept)} of down_proj


class Subject:
    """A dense model in fp32, held-out windows, and its hidden states over them."""

    def __init__(self, folder: Path, text: str | Path, seq_len: int, samples: int) -> None:
        self.folder = folder
        self.size = source.open_checkpoint(folder).size
        self.model = loading.load_model(folder, dtype="float32", device="cpu")
        self.ids = windows_for(folder, text, seq_len, samples, 0)
        with ResidentModel(self.model) as model:
            self.vocab = model.vocab
            self._downs = [mlp.down for mlp in model.parts.mlps]
            self._batches = fidelity.windows(self.ids.split(BATCH), self.vocab)
            self._dense_hidden = list(model.final_hidden(self._batches))

    @contextmanager
    def pruned(self, keep: Keep, fitted: Weights | None = None) -> Iterator[None]:
        """Make the model a pruned one inside, with the dense weights unless others are given."""
        dense = [down.weight for down in self._downs]
        try:
            for layer, (down, weight) in enumerate(zip(self._downs, dense, strict=True)):
                left = weight[:, keep[layer]] if fitted is None else fitted[layer]
                cut = torch.zeros_like(weight).index_copy_(1, keep[layer], left.detach())
                down.weight = nn.Parameter(cut, requires_grad=False)
            yield
        finally:
            for down, weight in zip(self._downs, dense, strict=True):
                down.weight = weight

    def measure(self, keep: Keep, fitted: Weights | None = None) -> fidelity.Fidelity:
        """Return the fidelity of a pruned model."""
        with self.pruned(keep, fitted), ResidentModel(self.model) as model:
            hidden, head = model.final_hidden(self._batches), model.head()
            return fidelity.compare(self._batches, self._dense_hidden, hidden, head, head)


class _Pruned(NamedTuple):
    """The identity of a pruned model, given the calibration."""

    refit: bool
    keep: tuple[bytes, ...]  # the neurons of each layer


class Seed:
    """The calibration windows of a seed, and what was scored on them, once for all variants."""

    def __init__(self, subject: Subject, ids: Tensor, seed: int) -> None:
        self.subject, self.ids, self.seed = subject, ids, seed
        self._batches: list[MicroBatch] = numbered(
            micro_batch(part, subject.vocab) for part in ids.split(BATCH)
        )
        self._measured: dict[_Pruned, fidelity.Fidelity] = {}

    def rows(self, variant: Variant, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Measure a variant at all ratios, whose refits share the dense model's run."""
        keeps = [self.keep(variant, ratio) for ratio in ratios]
        # An allocation that is chosen is often one that was measured as itself.
        models = [
            _Pruned(variant.refit, tuple(k.numpy().tobytes() for k in v.values())) for v in keeps
        ]
        new = {m: keep for m, keep in zip(models, keeps, strict=True) if m not in self._measured}
        fitted = self._fitted([*new.values()]) if variant.refit and new else [None] * len(new)
        for (pruned, keep), weights in zip(new.items(), fitted, strict=True):
            self._measured[pruned] = self.subject.measure(keep, weights)
        for ratio, keep, pruned in zip(ratios, keeps, models, strict=True):
            widths = [len(keep[layer]) for layer in range(len(keep))]
            yield {
                **asdict(variant),
                "prune_ratio": ratio,
                "seed": self.seed,
                "widths": widths,
                "param_ratio": self.subject.size.pruned_to(widths)["param_ratio"],
                **asdict(self._measured[pruned]),
            }

    def keep(self, variant: Variant, ratio: float) -> Keep:
        """Return the neurons that a variant keeps."""
        width = selection.target_width(self.subject.size, prune_ratio=ratio)
        importance = self._importance(variant)
        if variant.allocation != "auto":
            return selection.keep_top(importance, width, variant.allocation)
        keeps = [selection.keep_top(importance, width, a) for a in allocation.ALLOCATIONS_TRIED]
        with ResidentModel(self.subject.model) as model:
            kl = allocation.held_out_kl(model, allocation.trial(self._batches), keeps)
        return keeps[min(range(len(kl)), key=kl.__getitem__)]

    def _fitted(self, keeps: Sequence[Keep]) -> list[Weights]:
        with ResidentModel(self.subject.model) as model:
            return [result.weights for result in refit(model, self._batches, keeps)[0]]

    def _importance(self, variant: Variant) -> Tensor:
        if variant.criterion in ("magnitude", "random"):
            folder = self.subject.folder
            return pipeline.weights_table(folder, variant.criterion, self.seed).importance()
        if variant.criterion == "entropy, parity":
            return self._parity.importance("l1")
        return self._scores.importance(variant.statistic, variant.criterion)

    @cached_property
    def _parity(self) -> hf.ImportanceTable:
        bf16 = loading.load_model(self.subject.folder, dtype="bfloat16", device="cpu")
        return hf.score(bf16, self.ids.split(1), parity=True)

    @cached_property
    def _scores(self) -> hf.ImportanceTable:
        every = ["entropy", "cross_entropy", "fisher", "activation"]
        batches = self.ids.split(BATCH)
        return hf.score(self.subject.model, batches, criterion=every, obs=True, seed=self.seed)
