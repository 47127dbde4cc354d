"""Which recipe a request means, and whether there is all that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hfprune_fast.config import (
    DATA_FREE,
    MEASURED_ALLOCATIONS,
    PRESETS,
    Budget,
    Recipe,
    ScoringOptions,
)
from hfprune_fast.engine.distributed import Processes
from hfprune_fast.engine.planner import FACTOR_TOKENS
from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.allocation import trial_sequences
from hfprune_fast.scoring.criteria import CRITERIA
from hfprune_fast.scoring.job import check_criteria
from hfprune_fast.scoring.table import ImportanceTable


def checked_recipe(
    recipe: str | Recipe,
    changes: dict[str, Any],
    scores: ImportanceTable | None,
    calibration: str | Path | None,
    scoring: ScoringOptions,
    processes: Processes,
) -> Recipe:
    """Return a recipe with its changes, or refuse one without what it needs."""
    scored = None if scores is None else (scores.criteria, "obs" in scores.statistics)
    resolved = resolve_recipe(recipe, changes, scored, has_text=calibration is not None)
    data_free = resolved.criterion in DATA_FREE
    if scores is None and calibration is None and not data_free:
        raise ArgumentError("give --calibration SOURCE, or --scores FILE, or both")
    if scores is not None and data_free:
        raise ArgumentError(f"criterion {resolved.criterion} takes no --scores")
    if resolved.refits and calibration is None:
        raise ArgumentError(f"refit {resolved.refit} needs --calibration, the text to fit to")
    if data_free and scoring.resume:
        raise ArgumentError(f"criterion {resolved.criterion} scores nothing that could be resumed")
    if scores is None and not data_free:
        check_criteria((resolved.criterion,), resolved.select == "obs", scoring, processes)
    return resolved


def resolve_recipe(
    recipe: str | Recipe,
    changes: Mapping[str, Any],
    scored: tuple[tuple[str, ...], bool] | None = None,
    *,
    has_text: bool = True,
) -> Recipe:
    """Return a recipe with some fields changed, and those left open made to fit them.

    The default recipe ranks by what the scores hold: by removal costs if they are among it and no
    other criterion or statistic is given. It neither refits nor measures allocations without text.

    Args:
        recipe: a name in PRESETS, or a recipe, which is taken as it is but for `changes`.
        changes: fields of Recipe; None leaves one open.
        scored: of existing scores, their criteria, and whether they have removal costs.
        has_text: whether there is a calibration text.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if isinstance(recipe, Recipe):
        return Recipe(**{**asdict(recipe), **given})
    if not isinstance(recipe, str) or recipe not in PRESETS:
        raise ArgumentError(
            f"recipe must be a Recipe or one of {', '.join(PRESETS)}, got {shown(recipe)}"
        )
    values = asdict(PRESETS[recipe])
    if recipe == "default" and scored is not None:
        by_costs = scored[1] and "statistic" not in given
        values["criterion"] = "fisher" if by_costs else scored[0][0]
    values["criterion"] = given.get("criterion", values["criterion"])
    has_costs = values["criterion"] == "fisher" and (scored is None or scored[1])
    if not has_costs or "statistic" in given:
        values["select"] = "statistic"
    values["refit"] = given.get("refit", values["refit"] if has_text else "none")
    if values["allocation"] == "auto" and values["refit"] == "none":
        values["allocation"] = "uniform"
    if given.get("allocation") in MEASURED_ALLOCATIONS and not has_text:
        raise ArgumentError(
            f"allocation {given['allocation']} needs --calibration, the text to measure on"
        )
    return Recipe(**{**values, **given})


def for_experts(recipe: Recipe, budget: Budget) -> Recipe:
    """Return a recipe as it is for a model with experts, or refuse what it has not."""
    if recipe.allocation not in ("auto", "uniform"):
        raise ArgumentError(
            f"allocation {recipe.allocation} is not for models with experts, whose config.json has "
            "one width of them; use uniform"
        )
    no_text = recipe.criterion in DATA_FREE
    no_gradient = no_text or CRITERIA[recipe.criterion].head_loss is None
    if budget.of_experts and (no_text or (no_gradient and budget.expert_score == "taylor")):
        raise ArgumentError(
            f"criterion {recipe.criterion} ranks no experts by {budget.expert_score}, which needs "
            f"{'a text' if no_text and budget.expert_score != 'taylor' else 'a gradient'}; choose "
            "another --criterion, or another --expert-score"
        )
    return replace(recipe, allocation="uniform")


def pruning_flops(spec: ModelSpec, sequences: int, seq_len: int, device: torch.device) -> int:
    """Return about the FLOPs of the default recipe's matrix products, without attention's.

    Forwards: 2 of scoring (one of them its backward), 1 of the removal costs, 2 of the refit (dense
    and pruned), and 4 over the sequences of the allocation, dense twice and two pruned ones. A
    pruned layer runs twice on a GPU, and where it has experts. With each layer alone cut, the
    layers behind it run over a few tokens, and the head. Second moments, of which half is
    multiplied, are 2 · tokens · F² / 2 of each layer each time, and the greedy removal 3 updates of
    2 · n² for every n from F to 1, an inverse and two products. The ridges of the refits take 7
    factors of K³ / 3 three times, 4 · F³ at K = 0.8 F.
    """
    tokens, tried = sequences * seq_len, trial_sequences(sequences) / sequences
    forward = spec.flops_per_token // 2 * tokens
    moments = removal = 0
    for site, width in spec.sites.items():
        chosen = 1.0 if isinstance(site, int) else spec.experts_per_token / spec.num_experts
        moments += int(tokens * chosen) * width**2
        removal += 8 * width**3 + 2 * width**2 * spec.hidden_size
    if spec.experts:  # one allocation, so none is tried
        return 6 * forward + 2 * moments + removal
    of_pruned = 1 if device.type == "cpu" else 2
    refitting = 1 + of_pruned + (2 + 2 * of_pruned) * tried
    head = 2 * spec.hidden_size * spec.vocab_size
    few = min(int(tried * tokens) // 4, FACTOR_TOKENS) * spec.num_layers
    alone = few * (spec.flops_per_token // 2 + head) // 2
    return int((3 + refitting) * forward + (2 + 3 * tried) * moments) + alone + removal
