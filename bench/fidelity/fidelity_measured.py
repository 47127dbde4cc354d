"""How many neurons each layer keeps by measured KL: allocation "measured" of `fidelity.py`.

Removal costs are of second order, and what they miss differs between layers. Here each layer is cut
alone, to its part of the budget and by its costs, with its down_proj refitted to its own output;
KL(dense || pruned) of that, divided by the costs of what went, is the layer's factor. One ranking
across layers of costs times factors says how many neurons each keeps.

The dense model runs once over all batches, and each cut model over the held-out ones, from its
layer on: half a forward pass a layer. All residual streams of the held-out tokens are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel, for_each_layer
from hfprune_fast.engine.mlp_hooks import acts_of, pruned_down_proj
from hfprune_fast.evaluation.fidelity import compare
from hfprune_fast.pruning.selection import Keep
from hfprune_fast.scoring.moments import add_gram, mirror, token_rows
from hfprune_fast.scoring.obs import least_squares

HELD_OUT = 8  # sequences


@torch.no_grad()
def factors(
    model: ResidentModel,
    fitted: Sequence[MicroBatch],
    held_out: Sequence[MicroBatch],
    costs: Tensor,
    keep: Keep,
) -> Tensor:
    """Return (L,): KL of each layer alone cut to what it keeps, over the costs (L, F) of the rest.

    Args:
        model: the dense model, entered.
        fitted: what the refits are fitted to.
        held_out: what KL is measured on.
    """
    dense = [model.begin(batch) for batch in (*fitted, *held_out)]
    cut: list[list[Tensor]] = []  # of each layer that was, the streams of held_out

    def visit(layer: int) -> None:
        mlp, kept = model.parts.own_mlps[layer], keep[layer]
        weight = mlp.down.weight
        gram = torch.zeros(mlp.width, mlp.width, dtype=torch.float64)
        for i, batch in enumerate(fitted):
            with acts_of(mlp) as acts:
                dense[i] = model.run(layer, dense[i], batch)
            add_gram(gram, token_rows(acts[0], batch))
        mirror(gram).div_(sum(batch.tokens for batch in fitted))
        cross = weight.double() @ gram[:, kept]
        refitted = least_squares(gram[kept][:, kept], cross, weight[:, kept]).to(weight.dtype)
        for streams in cut:
            for i, batch in enumerate(held_out):
                streams[i] = model.run(layer, streams[i], batch)
        own = dense[len(fitted) :]
        with pruned_down_proj(mlp, kept, refitted):
            cut.append([model.run(layer, x, b) for x, b in zip(own, held_out, strict=True)])
        for i, batch in enumerate(held_out, len(fitted)):
            dense[i] = model.run(layer, dense[i], batch)

    for_each_layer(model, visit, then=model.head_unit)
    head, norm = model.head(), model.parts.norm
    whole = [norm(x) for x in dense[len(fitted) :]]
    kl = [compare(held_out, whole, map(norm, streams), head, head).kl_nats for streams in cut]
    removed = costs.clone()
    for layer, kept in keep.items():
        removed[layer, kept] = 0
    return torch.tensor(kl, dtype=torch.float64) / removed.sum(dim=1)
