"""Walk through the dense model and ask of each MLP what removing its neurons would cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import acts_of
from hfprune_fast.errors import NumericsError
from hfprune_fast.scoring.obs import removal_costs as costs_of_one

if TYPE_CHECKING:
    pass

Done = Callable[[float], object]


def _nothing(tokens: float) -> None:
    """Nobody counts."""


@torch.no_grad()
def removal_costs(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    output_fisher: Tensor | None = None,
    done: Done = _nothing,
) -> Tensor:
    """Return what each neuron's removal costs when the others are refitted, (L, F) float64.

    Args:
        model: entered.
        batches: the calibration.
        output_fisher: (L, D, D) C of each layer, the mean of what `scoring` adds up; None is the
            identity, whose costs are not comparable between layers.
        done: called with the tokens that were worked on, a layer at a time.

    Raises:
        NumericsError: NaN or inf in a layer's activations.
    """
    layers = len(model.parts.layers)
    tokens = sum(batch.tokens for batch in batches)
    stream = [_put_away(model.begin(batch)) for batch in batches]
    widest = max(mlp.down.in_features for mlp in model.parts.mlps)
    costs = torch.zeros(layers, widest, dtype=torch.float64)
    for layer in range(layers):
        mlp = model.parts.mlps[layer]
        with model.weights_of(layer, then=(layer + 1) % layers):
            width = mlp.down.weight.shape[1]
            gram = torch.zeros(width, width, dtype=torch.float64, device=model.device)
            for i, batch in enumerate(batches):
                with acts_of(mlp) as seen:
                    stream[i] = _put_away(model.run(layer, stream[i].to(model.device), batch))
                act = _rows(seen[0], batch).to(_maths(model))
                gram += act.t() @ act
                done(batch.tokens / layers)
            metric = None if output_fisher is None else output_fisher[layer].to(model.device)
            _check(gram, layer)
            costs[layer, :width] = costs_of_one(gram.div_(tokens), mlp.down.weight, metric).cpu()
    return costs


def _rows(tensor: Tensor, batch: MicroBatch) -> Tensor:
    """Return (tokens, ...) of a (B, T, ...) tensor, without padding."""
    mask = batch.token_mask
    return tensor.flatten(0, 1) if mask is None else tensor[mask.to(tensor.device)]


def _maths(model: ResidentModel) -> torch.dtype:
    return torch.promote_types(model.dtype, torch.float32)


def _put_away(hidden: Tensor) -> Tensor:
    return hidden.cpu()


def _check(gram: Tensor, layer: int) -> None:
    if not bool(gram.diagonal().isfinite().all()):
        raise NumericsError(f"NaN or inf in the MLP activations of layer {layer}; try float32")
