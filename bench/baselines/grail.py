"""GRAIL: the weights of down_proj that give its dense output back best from the kept channels.

Tang et al., "GRAIL: Post-hoc Compensation by Linear Reconstruction for Compressed Networks", 2026,
arXiv 2602.23795. In our own words: no code is taken from it. With the Gram matrix G = Σ_t a_t a_tᵀ
of down_proj's inputs and the kept channels K, ridge regression maps a_K to all of a, and the map is
absorbed into the weights W (D, F):

    W' = W G_:K (G_KK + λ mean(diag G_KK) I)⁻¹

What the paper leaves open, and what is done here:
- λ is 1e-3, its released code's default (the examples there turn it off with 0). No search for it.
- No bias: the regression already gives back what it can of the removed channels' means, so that
  FLAP's bias on top would count them twice.
- Two forms. `reconstruct_from` takes G from the dense model's activations. `reconstruct_in_turn` is
  the interleaved one of the released code: a layer's G comes from a model whose earlier layers are
  pruned and compensated, and its target is what its own dense weights make of that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from activations import BATCH, gated_mlps
from torch import Tensor
from transformers import PreTrainedModel

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel

RIDGE = 1e-3


def reconstruct(
    weight: Tensor, gram: Tensor, kept: Tensor, mean_diagonals: float = RIDGE
) -> Tensor:
    """Return W' (D, K) float64 of a down_proj W (D, F) with the Gram matrix (F, F) of its input."""
    system = gram[kept][:, kept].clone()
    system.diagonal().add_(mean_diagonals * system.diagonal().mean())
    # W' A = W G_:K with a symmetric A, so W'ᵀ solves A X = G_K: Wᵀ.
    return torch.linalg.solve(system, gram[kept] @ weight.double().T).T


def reconstruct_from(
    grams: Sequence[Tensor], down: Sequence[Tensor], keep: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Return the weights of each pruned down_proj, from the dense model's own activations."""
    return {
        layer: reconstruct(down[layer], grams[layer], kept).to(down[layer].dtype)
        for layer, kept in keep.items()
    }


@torch.no_grad()
def reconstruct_in_turn(
    model: PreTrainedModel, ids: Tensor, keep: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Return the weights of each pruned down_proj, a layer after the other; the model stays."""
    model, found = copy.deepcopy(model), {}
    batches = MicroBatch(ids, (ids.shape[1],) * len(ids)).split(BATCH)
    with ResidentModel(model) as layers:
        streams = [layers.begin(batch) for batch in batches]
        for layer, mlp in enumerate(gated_mlps(model)):
            gram = torch.zeros(mlp.width, mlp.width, dtype=torch.float64)

            def add(_: object, inputs: tuple[Tensor], gram: Tensor = gram) -> None:
                act = inputs[0].flatten(0, -2)
                gram += act.T @ act

            handle = mlp.down.register_forward_pre_hook(add)
            for stream, batch in zip(streams, batches, strict=True):
                layers.run(layer, stream, batch)
            handle.remove()
            weight = reconstruct(mlp.down.weight, gram, keep[layer]).to(mlp.down.weight.dtype)
            # Zeros in the removed columns: the pruned layer's output at the dense layer's width.
            mlp.down.weight.zero_()[:, keep[layer]] = weight
            streams = [layers.run(layer, s, b) for s, b in zip(streams, batches, strict=True)]
            found[layer] = weight
    return found
