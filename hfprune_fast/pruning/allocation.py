"""From scores to a smaller checkpoint: who gets how many neurons, the refit, the writing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint import source as checkpoints
from hfprune_fast.config import Recipe
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.batches import MicroBatch, micro_batch, numbered
from hfprune_fast.data.calibration import windows_for
from hfprune_fast.engine import planner
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.streaming import running
from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation import fidelity
from hfprune_fast.pruning import on_disk, selection
from hfprune_fast.pruning.refit import Keep, refit
from hfprune_fast.scoring.score import DEFAULT_SAMPLES, score
from hfprune_fast.scoring.table import ImportanceTable

# What allocation "auto" tries, on at most so many sequences, of which a quarter is not fitted to.
ALLOCATIONS_TRIED = (0.0, 0.5, 1.0)
_TRIAL_SEQUENCES = 64
# Below this a refit follows the calibration text more than the model.
_TOKENS_A_NEURON = 8


@dataclass(frozen=True)
class Cut:
    """Which neurons go: a budget, and what `selection.keep_top` knows beside it."""

    width: int
    min_keep: float = selection.MIN_KEEP
    protect: Collection[int] = ()
    round_to: int = 1

    def keep(self, importance: Tensor, allocation: str | float) -> dict[int, Tensor]:
        return selection.keep_top(
            importance, self.width, allocation, self.min_keep, self.protect, self.round_to
        )


class Fitting:
    """A dense model by path and its calibration, to fit pruned ones to.

    Args:
        model: a folder, hub name or `demo`.
        source: calibration text or ids.
        others: as of `score`.
    """

    def __init__(
        self,
        model: str | Path,
        source: str | Path,
        *,
        samples: int | None = DEFAULT_SAMPLES,
        seq_len: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offload: str = "auto",
        memory_budget: str | None = None,
        progress: bool = False,
    ) -> None:
        self._folder, self._progress = checkpoints.find_model(model), progress
        ids = windows_for(self._folder, source, seq_len, samples, seed)
        self._how = {"dtype": dtype, "device": device}
        blueprint = loading.blueprint(self._folder, dtype=dtype, device=device)
        shape = planner.ModelShape.of(blueprint.checkpoint.size, blueprint.model.config)
        self._plan = planner.plan_scoring(
            shape,
            device=blueprint.device,
            dtype=blueprint.dtype,
            seq_len=ids.shape[1],
            sequences=len(ids),
            batch_size=batch_size,
            offload=offload,
            memory_budget=memory_budget,
            fitting=True,
        )
        tokens, width = ids.numel(), shape.size.intermediate_size
        if tokens < _TOKENS_A_NEURON * width:
            say(
                f"{tokens} calibration tokens are few to refit {width} neurons a layer; "
                f"{_TOKENS_A_NEURON * width} or more generalise better"
            )
        self.batches = numbered(
            micro_batch(part, shape.vocab_size) for part in ids.split(self._plan.batch_size)
        )

    def refit(self, keep: Keep) -> dict[str, Tensor]:
        """Return {tensor name of the checkpoint: refitted down_proj, as it is to be stored}."""
        blueprint = loading.blueprint(self._folder, **self._how)
        with (
            token_bar("refitting", _tokens(self.batches), self._progress) as done,
            running(blueprint, self._plan.offload) as model,
        ):
            (result,), _ = refit(model, self.batches, [keep], on_progress=done)
        family, stored = blueprint.checkpoint.family, blueprint.checkpoint.tensors
        replaced = {}
        for layer, weight in result.weights.items():
            ours = f"{family.decoder}.{family.layers}.{layer}.{family.down}.weight"
            name = blueprint.names[ours]
            replaced[name] = weight.to(checkpoints.TORCH_DTYPES[stored[name].dtype])
        return replaced

    def closest(self, keeps: Sequence[Keep]) -> tuple[int, list[float]]:
        """Return which keep is closest to the dense model after a refit, and KL in nats of each.

        KL(dense || pruned) is over sequences that were not fitted to.
        """
        blueprint = loading.blueprint(self._folder, **self._how)
        batches = trial(self.batches)
        with (
            token_bar("allocating", _tokens(batches), self._progress) as done,
            running(blueprint, self._plan.offload) as model,
        ):
            kl = held_out_kl(model, batches, keeps, done)
        return min(range(len(kl)), key=kl.__getitem__), kl


def trial(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the first sequences of a calibration, in two micro-batches or more."""
    first: list[MicroBatch] = []
    for batch in batches:
        if sum(len(b.ids) for b in first) >= _TRIAL_SEQUENCES:
            break
        first.append(batch)
    if len(first) == 1:
        first = first[0].split(max(1, len(first[0].ids) * 3 // 4))
    if len(first) == 1:
        raise ArgumentError("allocation auto needs 2 calibration samples or more, got 1")
    return first


def held_out_kl(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    keeps: Sequence[Keep],
    done: Callable[[float], object] = lambda tokens: None,
) -> list[float]:
    """Return KL(dense || pruned) of each keep over the last quarter of the batches.

    They are refitted on the others.
    """
    held_out = max(1, len(batches) // 4)
    results, dense = refit(model, batches, keeps, held_out=held_out, on_progress=done)
    head = model.head()
    return [
        fidelity.compare(batches[-held_out:], dense, r.hidden, head, head).kl_nats for r in results
    ]


def _tokens(batches: Sequence[MicroBatch]) -> int:
    return sum(batch.tokens for batch in batches)


def allocate(
    importance: Tensor, cut: Cut, recipe: Recipe, fitting: Fitting | None
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Return the neurons to keep and what is to be told about the choice."""
    if recipe.allocation != "auto":
        return cut.keep(importance, recipe.allocation), {"allocation": recipe.allocation}
    if fitting is None:
        raise ArgumentError("allocation auto needs --calibration; choose uniform or global")
    keeps = [cut.keep(importance, number) for number in ALLOCATIONS_TRIED]
    best, kl = fitting.closest(keeps)
    tried = dict(zip(map(str, ALLOCATIONS_TRIED), kl, strict=True))
    say(
        "allocation: KL on held-out calibration is "
        + ", ".join(
            f"{nats:.4f} {name}"
            for name, nats in zip(("uniform", "halfway", "global"), kl, strict=True)
        )
    )
    return keeps[best], {"allocation": ALLOCATIONS_TRIED[best], "allocations_kl_nats": tried}


def score_in_steps(
    model: str | Path, source: str | Path, recipe: Recipe, cut: Cut, beside: Path, **how: Any
) -> ImportanceTable:
    """Score, remove a part of what is to go, score what is left, and so on; return the last table.

    What was removed has weights of zero in the model that is scored next, and so scores of zero.
    That model is a folder in `beside`, as large as the dense one, which is gone afterwards.

    Args:
        how: as of `score`.
    """
    obs = recipe.select == "obs"
    table = score(model, source, criterion=recipe.criterion, obs=obs, **how)
    dense = table.model.intermediate_size
    for step in range(1, recipe.steps):
        say(f"step {step} of {recipe.steps}")
        part = replace(cut, width=dense - (dense - cut.width) * step // recipe.steps, round_to=1)
        fitting = Fitting(model, source, **fitting_options(how)) if recipe.refit else None
        importance = table.importance(recipe.ranks_by, recipe.criterion)
        keep, _ = allocate(importance, part, recipe, fitting)
        with tempfile.TemporaryDirectory(prefix=".hfprune-step-", dir=beside) as scratch:
            so_far = Path(scratch) / "model"
            _write_zeroed(model, so_far, keep, fitting)
            again = {**how, "state_file": None, "resume": False}
            scored = score(so_far, source, criterion=recipe.criterion, obs=obs, **again)
        told = {key: table.provenance[key] for key in ("model", "model_fingerprint")}
        table = replace(scored, provenance={**scored.provenance, **told, "step": step + 1})
    return table


def fitting_options(how: dict[str, Any]) -> dict[str, Any]:
    """Return those of `score`'s options that `Fitting` has as well."""
    names = (
        *("samples", "seq_len", "seed", "batch_size"),
        *("device", "dtype", "offload", "memory_budget", "progress"),
    )
    return {name: how[name] for name in names if name in how}


def _write_zeroed(model: str | Path, out: Path, keep: Keep, fitting: Fitting | None) -> None:
    """Write the dense model with the removed neurons' columns of down_proj set to zero."""
    opened = checkpoints.open_checkpoint(checkpoints.find_model(model))
    refitted = {} if fitting is None else fitting.refit(keep)
    replaced = {}
    for layer, kept in keep.items():
        suffix = f"{opened.family.layers}.{layer}.{opened.family.down}.weight"
        name = next(name for name in opened.tensors if name.endswith(suffix))
        whole = opened.read(name)
        left = refitted.get(name, whole[:, kept])
        replaced[name] = torch.zeros_like(whole).index_copy_(1, kept, left)
    everything = torch.arange(opened.size.intermediate_size)
    on_disk.prune_checkpoint(
        model, out, dict.fromkeys(range(opened.size.num_layers), everything), replace=replaced
    )


def asked(recipe: Recipe, cut: Cut, budget: dict[str, Any]) -> dict[str, Any]:
    """Return what was asked for, for the record."""
    given = {name: value for name, value in budget.items() if value is not None}
    return {**given, **asdict(recipe), "round_to": cut.round_to, "protect": sorted(cut.protect)}
