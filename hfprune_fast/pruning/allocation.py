"""How many neurons each layer keeps: by a rule, or by KL measured on held-out calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hfprune_fast.config import MEASURED_ALLOCATIONS, Recipe
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import OnProgress, ResidentModel, no_progress
from hfprune_fast.engine.planner import FACTOR_TOKENS
from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation.fidelity import kl_of_each
from hfprune_fast.pruning.layer_factors import layer_factors
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

    Allocation "measured" ranks across layers by importance times each layer's factor (see
    `layer_factors`). "auto" takes this or "uniform", whichever refitted model has the lower
    KL(dense || pruned) on sequences that it was not fitted to. Neither measures where nothing is
    removed.

    Args:
        model: the dense model, entered; None where nothing is refitted.
        batches: the calibration.
        importance: (L, F), higher = keep; the row of a narrower layer ends in zeros.

    Raises:
        ArgumentError: the allocation is measured, and there is no model or a single sample.
        NumericsError: the activations of a layer, or logits, hold NaN or inf.
    """
    if recipe.allocation not in MEASURED_ALLOCATIONS:
        return budget.keep(importance, recipe.allocation), {"allocation": recipe.allocation}
    if model is None:
        raise ArgumentError(
            f"allocation {recipe.allocation} needs --calibration; choose uniform or global"
        )
    uniform = budget.keep(importance, "uniform")
    if [len(kept) for kept in uniform.values()] == budget.even_widths() == list(budget.dense):
        # Each rounds its widths by itself, and neither removes a neuron.
        return uniform, {"allocation": "uniform"}
    tried = trial_batches(batches)
    held_out = max(1, len(tried) // 4)
    fitted, few = tried[:-held_out], factor_batches(tried[-held_out:])
    tokens = sum(batch.tokens for batch in (*fitted, *few))
    with token_bar("measuring layers", tokens, progress) as on_progress:
        factors = layer_factors(model, fitted, few, uniform, importance, on_progress)
    measured = budget.keep(importance, "global", factors)
    if recipe.allocation == "measured":
        return measured, {"allocation": "measured"}
    keeps = {"uniform": uniform, "measured": measured}
    with token_bar("allocating", sum(batch.tokens for batch in tried), progress) as on_progress:
        kl_nats = held_out_kl(model, tried, list(keeps.values()), held_out, on_progress)
    by_name = dict(zip(keeps, kl_nats, strict=True))
    best = min(by_name, key=by_name.__getitem__)
    each = ", ".join(f"{nats:.4f} {name}" for name, nats in by_name.items())
    say(f"allocation: KL on held-out calibration is {each}")
    return keeps[best], {"allocation": best, "allocations_kl_nats": by_name}


def trial_sequences(sequences: int) -> int:
    """Return how many sequences of a calibration allocations are tried on."""
    return min(max(sequences // 2, _MIN_TRIAL_SEQUENCES), _MAX_TRIAL_SEQUENCES, sequences)


def trial_batches(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the first sequences of a calibration, in two micro-batches or more."""
    needed = trial_sequences(sum(len(batch.ids) for batch in batches))
    first: list[MicroBatch] = []
    for batch in batches:
        if sum(len(b.ids) for b in first) >= needed:
            break
        first.append(batch)
    if len(first) == 1:
        first = first[0].split(max(1, len(first[0].ids) * 3 // 4))
    if len(first) == 1:
        raise ArgumentError(
            "auto and measured allocation need 2 calibration samples or more, got 1"
        )
    return first


def factor_batches(held_out: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the sequences that each layer's factor is measured on: FACTOR_TOKENS, or one."""
    few: list[MicroBatch] = []
    for batch in held_out:
        room = FACTOR_TOKENS - sum(each.tokens for each in few)
        sequences = room // max(batch.lengths)
        if few and sequences < 1:
            break
        few.append(batch.split(max(1, sequences))[0])
    return few


def held_out_kl(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    keeps: Sequence[Keep],
    held_out: int,
    on_progress: OnProgress = no_progress,
) -> list[float]:
    """Return KL(dense || pruned) in nats of each keep over the last `held_out` batches.

    The pruned models are refitted on the others.
    """
    results, dense = refit(model, batches, keeps, held_out=held_out, on_progress=on_progress)
    hidden = [result.hidden for result in results]
    return kl_of_each(batches[-held_out:], dense, hidden, model.head())
