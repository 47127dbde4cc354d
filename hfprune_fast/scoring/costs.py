"""Run the dense model layer by layer and compute what removing each MLP's neurons would cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import (
    OnProgress,
    ResidentModel,
    each_batch,
    for_each_layer,
    no_progress,
)
from hfprune_fast.engine.mlp_hooks import acts_of
from hfprune_fast.errors import NumericsError
from hfprune_fast.scoring.obs import greedy_removal_costs


@torch.no_grad()
def removal_costs(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    output_fisher: Tensor | None = None,
    on_progress: OnProgress = no_progress,
) -> Tensor:
    """Return what each neuron's removal costs when the others are refitted, (L, F) float64.

    Args:
        model: the entered model.
        batches: the calibration.
        output_fisher: (L, D, D) C of each layer, a mean over tokens; None is the identity, whose
            costs are not comparable between layers.
        on_progress: called with the tokens processed, a layer at a time.

    Raises:
        NumericsError: the activations of a layer hold NaN or inf.
    """
    tokens = sum(batch.tokens for batch in batches)
    hidden = [model.begin(batch).cpu() for batch in batches]
    mlps = model.parts.mlps
    costs = torch.zeros(len(mlps), max(mlp.down.in_features for mlp in mlps)).double()

    def visit(layer: int) -> None:
        mlp = mlps[layer]
        width = mlp.down.weight.shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64, device=model.device)
        for i, batch in each_batch(batches, on_progress, len(mlps)):
            with acts_of(mlp) as acts:
                hidden[i] = model.run(layer, hidden[i].to(model.device), batch).cpu()
            act = token_rows(acts[0], batch).to(moments_dtype(model))
            gram += act.t() @ act
        check_moments(gram, layer)
        metric = None if output_fisher is None else output_fisher[layer].to(model.device)
        costs[layer, :width] = greedy_removal_costs(gram.div_(tokens), mlp.down.weight, metric)

    for_each_layer(model, visit, then=0)
    return costs


def token_rows(tensor: Tensor, batch: MicroBatch) -> Tensor:
    """Return (tokens, ...) of a (B, T, ...) tensor, without padding."""
    mask = batch.token_mask
    return tensor.flatten(0, 1) if mask is None else tensor[mask.to(tensor.device)]


def moments_dtype(model: ResidentModel) -> torch.dtype:
    """Return the dtype in which a batch's second moments are multiplied: fp32 at least."""
    return torch.promote_types(model.dtype, torch.float32)


def check_moments(gram: Tensor, layer: int) -> None:
    """Raise NumericsError if the second moments of a layer's acts hold NaN or inf."""
    if not bool(gram.diagonal().isfinite().all()):
        raise NumericsError(f"NaN or inf in the MLP activations of layer {layer}; try float32")
