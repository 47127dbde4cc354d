"""Importance and a budget -> the neurons to keep.

A budget is one of: the fraction of MLP neurons to remove (prune_ratio), the fraction of all the
model's parameters to remove (param_ratio), or the width itself (intermediate_size). All layers get
the same width.
"""

from __future__ import annotations

import math

from torch import Tensor

from hfprune_fast.architectures import ModelSize
from hfprune_fast.errors import ArgumentError
from hfprune_fast.importance import ImportanceTable


def select(
    table: ImportanceTable,
    *,
    prune_ratio: float | None = None,
    param_ratio: float | None = None,
    intermediate_size: int | None = None,
    statistic: str = "l1",
    round_to: int = 1,
) -> dict[int, Tensor]:
    """Return the neurons to keep: {layer: sorted (width,) int64 indices}.

    Args:
        table: the scores.
        prune_ratio: fraction of MLP neurons to remove, in [0, 1).
        param_ratio: fraction of all parameters to remove, in [0, 1).
        intermediate_size: the width to prune to.
        statistic: "l1" (the paper's), "l2", "mask" or "act".
        round_to: the width becomes the nearest multiple of this that is not wider than dense.

    Raises:
        ArgumentError: not exactly one budget, one out of range, or one that cannot be reached.

    Of equally important neurons the one with the lower index is kept.
    """
    width = target_width(
        table.model,
        prune_ratio=prune_ratio,
        param_ratio=param_ratio,
        intermediate_size=intermediate_size,
        round_to=round_to,
    )
    return keep_top(table.importance(statistic), width)


def keep_top(importance: Tensor, width: int) -> dict[int, Tensor]:
    """Return each layer's `width` most important neurons of a (L, F) importance, ties by index."""
    order = importance.sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :width].sort(dim=1).values.cpu()
    return dict(enumerate(kept.unbind()))


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
