"""How many neurons each layer keeps: by a rule, or by KL measured on held-out calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hfprune_fast.config import ALLOCATIONS_TRIED, Recipe
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import OnProgress, ResidentModel, no_progress
from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation.fidelity import compare
from hfprune_fast.pruning.refit import refit
from hfprune_fast.pruning.selection import Keep, WidthBudget

# Half of the calibration's sequences, at least and at most so many; a quarter of them is held out.
_MIN_TRIAL_SEQUENCES, _MAX_TRIAL_SEQUENCES = 16, 64


def choose(
    model: ResidentModel | None,
    batches: Sequence[MicroBatch],
    importance: Tensor,
    budget: WidthBudget,
    recipe: Recipe,
    progress: bool = False,
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Return the neurons to keep, and the choice as it is recorded.

    Allocation "auto" takes the one of ALLOCATIONS_TRIED whose refitted model has the lowest
    KL(dense || pruned) on sequences that it was not fitted to.

    Args:
        model: the dense model, entered; None where nothing is refitted.
        batches: the calibration.
        importance: (L, F), higher = keep; the row of a narrower layer ends in zeros.
    """
    if recipe.allocation != "auto":
        return budget.keep(importance, recipe.allocation), {"allocation": recipe.allocation}
    if model is None:
        raise ArgumentError("allocation auto needs --calibration; choose uniform or global")
    numbers = list(ALLOCATIONS_TRIED.values())
    keeps = [budget.keep(importance, number) for number in numbers]
    tried = trial(batches)
    with token_bar("allocating", sum(batch.tokens for batch in tried), progress) as on_progress:
        kl_nats = held_out_kl(model, tried, keeps, on_progress)
    best = min(range(len(keeps)), key=kl_nats.__getitem__)
    each = [f"{nats:.4f} {name}" for name, nats in zip(ALLOCATIONS_TRIED, kl_nats, strict=True)]
    say(f"allocation: KL on held-out calibration is {', '.join(each)}")
    measured = dict(zip(map(str, numbers), kl_nats, strict=True))
    return keeps[best], {"allocation": numbers[best], "allocations_kl_nats": measured}


def trial(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the first sequences of a calibration, in two micro-batches or more."""
    half = sum(len(batch.ids) for batch in batches) // 2
    needed = min(max(half, _MIN_TRIAL_SEQUENCES), _MAX_TRIAL_SEQUENCES)
    first: list[MicroBatch] = []
    for batch in batches:
        if sum(len(b.ids) for b in first) >= needed:
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
    on_progress: OnProgress = no_progress,
) -> list[float]:
    """Return KL(dense || pruned) in nats of each keep over the last quarter of the batches.

    The pruned models are refitted on the others.
    """
    held_out = max(1, len(batches) // 4)
    results, dense = refit(model, batches, keeps, held_out=held_out, on_progress=on_progress)
    head = model.head()
    return [
        compare(batches[-held_out:], dense, result.hidden, head, head).kl_nats for result in results
    ]
