"""Importance and a budget -> the neurons to keep.

A budget is one of: the fraction of MLP neurons to remove (prune_ratio), the fraction of all the
model's parameters to remove (param_ratio), or the width itself (intermediate_size), which is the
mean width where layers differ. An allocation says which layer gets how many:

    uniform    all the same
    global     one ranking across layers
    a number   between the two, 0 is uniform and 1 global

In every allocation of a budget the same number of neurons is kept in all. Protected layers keep all
of theirs, on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.spec import ModelSize, widths_text
from hfprune_fast.scoring.table import ImportanceTable

MIN_KEEP = 0.05  # of each layer's neurons, in a global ranking


def select(
    table: ImportanceTable,
    *,
    prune_ratio: float | None = None,
    param_ratio: float | None = None,
    intermediate_size: int | None = None,
    criterion: str | None = None,
    statistic: str | None = None,
    allocation: str | float = "uniform",
    min_keep: float = MIN_KEEP,
    protect: Collection[int] = (),
    round_to: int = 1,
) -> dict[int, Tensor]:
    """Return the neurons to keep: {layer: sorted (width,) int64 indices}.

    Args:
        table: the scores.
        prune_ratio: fraction of MLP neurons to remove, in [0, 1).
        param_ratio: fraction of all parameters to remove, in [0, 1).
        intermediate_size: the (mean) width to prune to.
        criterion: which of the table's; by default the first.
        statistic: "l1" (the paper's), "l2", "mask", "act" or "obs"; by default the criterion's.
        allocation: "uniform", "global" or a number between 0 (uniform) and 1 (global).
        min_keep: the part of a layer's neurons that a global ranking leaves it at least.
        protect: layers that are not pruned; the others are, as if they were the whole model.
        round_to: widths become multiples of this that are not wider than dense; their mean is the
            nearest one to what was asked for.

    Raises:
        ArgumentError: not exactly one budget, one out of range, or one that cannot be reached; an
            unknown allocation, layer, criterion or statistic.

    Of equally important neurons the one with the lower index is kept.
    """
    width = target_width(
        table.model,
        prune_ratio=prune_ratio,
        param_ratio=param_ratio,
        intermediate_size=intermediate_size,
        round_to=round_to,
    )
    importance = table.importance(statistic, criterion)
    return keep_top(importance, width, allocation, min_keep, protect, round_to)


def keep_top(
    importance: Tensor,
    width: int,
    allocation: str | float = "uniform",
    min_keep: float = MIN_KEEP,
    protect: Collection[int] = (),
    round_to: int = 1,
) -> dict[int, Tensor]:
    """Return each layer's most important neurons of a (L, F) importance, ties by index."""
    layers, dense = importance.shape
    protected = _check_layers(protect, layers)
    pruned = [layer for layer in range(layers) if layer not in protected]
    widths = dict.fromkeys(protected, dense)
    widths |= dict(
        zip(
            pruned,
            _widths(importance[pruned], width, _as_number(allocation), min_keep, round_to),
            strict=True,
        )
    )
    order = importance.sort(dim=1, descending=True, stable=True).indices.cpu()
    return {layer: order[layer, : widths[layer]].sort().values for layer in range(layers)}


def _widths(
    importance: Tensor, width: int, allocation: float, min_keep: float, step: int
) -> list[int]:
    """Return a width for each layer of a (L, F) importance: multiples of step, `width` on average.

    Neurons are dealt in blocks of step, best first in each layer, so whole blocks are what the
    ranking compares.
    """
    layers, dense = importance.shape
    if not 0 <= min_keep <= 1:
        raise ArgumentError(f"min_keep must be in [0, 1], got {min_keep}")
    if allocation == 0 or width == dense:
        return [width] * layers
    blocks, wanted = dense // step, width // step
    ranked = importance.sort(dim=1, descending=True).values[:, : blocks * step]
    worth = ranked.view(layers, blocks, step).mean(dim=2)
    least = min(wanted, max(1, math.ceil(min_keep * dense / step)))
    worth[:, :least] = torch.inf
    order = worth.flatten().sort(descending=True, stable=True).indices[: layers * wanted]
    dealt = torch.bincount(order // blocks, minlength=layers).double()
    shares = wanted + allocation * (dealt - wanted)
    # Rounded down, and what is missing then goes to the largest remainders.
    counts = shares.floor().long()
    missing = layers * wanted - int(counts.sum())
    counts[(shares - counts).sort(descending=True, stable=True).indices[:missing]] += 1
    return [int(count) * step for count in counts]


def _as_number(allocation: str | float) -> float:
    number = {"uniform": 0.0, "global": 1.0}.get(str(allocation), allocation)
    if not isinstance(number, int | float) or not 0 <= number <= 1:
        raise ArgumentError(
            f"allocation must be uniform, global or a number in [0, 1], got {allocation!r}"
        )
    return float(number)


def _check_layers(protect: Collection[int], layers: int) -> set[int]:
    for layer in protect:
        if not 0 <= layer < layers:
            raise ArgumentError(f"protect names layer {layer}; the model has 0..{layers - 1}")
    if len(set(protect)) == layers:
        raise ArgumentError("protect names every layer, so none is left to prune")
    return set(protect)


def target_width(
    size: ModelSize,
    *,
    prune_ratio: float | None = None,
    param_ratio: float | None = None,
    intermediate_size: int | None = None,
    round_to: int = 1,
) -> int:
    """Return the width that a budget asks for, rounded to the nearest multiple of round_to."""
    dense = size.intermediate_size
    if size.mlp_widths is not None:
        raise ArgumentError(
            f"the model's layers have {widths_text(size.mlp_widths)} MLP neurons, and neurons are "
            "chosen only where all have as many; give prune_checkpoint a keep of your own"
        )
    budgets = {
        "prune_ratio": prune_ratio,
        "param_ratio": param_ratio,
        "intermediate_size": intermediate_size,
    }
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) if given else "none"
        raise ArgumentError(
            f"give exactly one of prune_ratio, param_ratio, intermediate_size; got {got}"
        )
    if round_to < 1:
        raise ArgumentError(f"round_to must be at least 1, got {round_to}")
    if prune_ratio is not None:
        _check_ratio("prune_ratio", prune_ratio)
        exact = dense * (1 - prune_ratio)
    elif param_ratio is not None:
        _check_ratio("param_ratio", param_ratio)
        most = size.num_layers * (dense - 1) * size.params_per_neuron / size.total_params
        if param_ratio > most:
            raise ArgumentError(
                f"param_ratio {param_ratio} cannot be reached: the MLPs hold at most "
                f"{most:.4f} of all parameters"
            )
        per_layer = param_ratio * size.total_params / (size.num_layers * size.params_per_neuron)
        exact = dense - per_layer
    else:
        assert intermediate_size is not None
        if not isinstance(intermediate_size, int) or not 1 <= intermediate_size <= dense:
            raise ArgumentError(
                f"intermediate_size must be in 1..{dense} (the dense width), "
                f"got {intermediate_size}"
            )
        exact = intermediate_size
    return _round(exact, dense, round_to)


def _round(exact: float, dense: int, step: int) -> int:
    if exact == dense:  # nothing to remove, also when dense is no multiple of step
        return dense
    if step > dense:
        raise ArgumentError(f"round_to {step} is more than the dense width {dense}")
    nearest = math.floor(exact / step + 0.5) * step
    return min(max(nearest, step), dense // step * step)


def _check_ratio(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ArgumentError(f"{name} must be in [0, 1), got {value}")
