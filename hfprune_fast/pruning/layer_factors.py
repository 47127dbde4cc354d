"""How far importance understates each layer: KL measured with one layer alone cut.

Removal costs are of second order, and what that misses differs between layers: on SmolLM2-135M the
KL of one layer alone cut is 1.4 to 3.9 times what its removed neurons were said to cost. Here each
layer in turn is cut to its part of a budget, and its down_proj is fitted to its own output; its
factor is KL(dense || pruned) of that model over the importance of what went. One ranking across
layers of importance times factor is allocation "measured". (Scores of blocks that are replaced one
at a time choose the architecture in Puzzle, arXiv 2411.19146, too.)

Of each layer's KL and importance, a twentieth of the layers' mean is added to both, so that a layer
says little of which little went. Where only dead neurons went, its KL is 0 or of rounding alone,
and the factor would give no neuron to the others of that layer, or all to it.
"""

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
from hfprune_fast.engine.mlp_hooks import inputs_of, outputs_of, pruned_down_proj
from hfprune_fast.evaluation.fidelity import kl_of_each
from hfprune_fast.pruning.normal_equations import NormalEquations
from hfprune_fast.pruning.selection import Keep
from hfprune_fast.scoring.moments import moments_dtype, token_rows

_OF_MEAN = 0.05


@torch.no_grad()
def layer_factors(
    model: ResidentModel,
    fitted: Sequence[MicroBatch],
    held_out: Sequence[MicroBatch],
    keep: Keep,
    importance: Tensor,
    on_progress: OnProgress = no_progress,
) -> Tensor:
    """Return (L,) float64 factors; of a layer that is left whole, that of all the others together.

    The dense model runs once, and each model with a cut layer from that layer on, over `held_out`
    alone; their residual streams are in memory.

    Args:
        model: the dense model, entered.
        fitted: what each cut layer is fitted to.
        held_out: what KL is measured on.
        keep: what each layer keeps when it is cut.
        importance: (L, F); the row of a narrower layer ends in zeros.
        on_progress: called with the tokens processed, a layer at a time.

    Raises:
        NumericsError: the activations of a layer, or logits, hold NaN or inf.
    """
    streams = [model.kept(model.begin(batch)) for batch in (*fitted, *held_out)]
    cut: dict[int, list[Tensor]] = {}  # {layer: the streams of held_out}

    def run(layer: int, stream: Tensor, batch: MicroBatch) -> Tensor:
        return model.kept(model.run(layer, stream.to(model.device), batch))

    def visit(layer: int) -> None:
        mlp, kept = model.parts.own_mlps[layer], keep[layer].to(model.device)
        equations = NormalEquations(mlp.down.weight.detach()[:, kept])
        for i, batch in each_batch(fitted, on_progress, model.head_unit):
            with inputs_of(mlp.down) as acts, outputs_of(mlp.down) as outputs:
                streams[i] = run(layer, streams[i], batch)
            output = outputs[0] if mlp.down.bias is None else outputs[0] - mlp.down.bias
            target = output.to(moments_dtype(model))
            act = acts[0].index_select(-1, kept)
            equations.add(token_rows(act, batch), token_rows(target, batch))
        for own in cut.values():
            own[:] = [run(layer, *each) for each in zip(own, held_out, strict=True)]
        before = streams[len(fitted) :]
        if len(kept) < mlp.width:
            weight = equations.solve(layer).to(model.dtype)
            with pruned_down_proj(mlp, kept, weight):
                cut[layer] = [run(layer, *each) for each in zip(before, held_out, strict=True)]
        for i, batch in each_batch(held_out, on_progress, model.head_unit):
            streams[len(fitted) + i] = run(layer, before[i], batch)

    for_each_layer(model, visit, then=model.head_unit)
    with model.weights_of(model.head_unit, then=0):
        dense = [model.normed(hidden).cpu() for hidden in streams[len(fitted) :]]
        # One by one: all streams and their final hidden states would not fit the plan together.
        pruned = {
            layer: [model.normed(hidden).cpu() for hidden in cut.pop(layer)] for layer in list(cut)
        }
    layers = list(pruned)
    nats = kl_of_each(held_out, dense, list(pruned.values()), model.head())
    kl_nats, removed = torch.zeros(2, len(importance), dtype=torch.float64)
    kl_nats[layers] = torch.tensor(nats, dtype=torch.float64).clamp(min=0)  # less by rounding
    for layer in layers:
        removed[layer] = importance[layer].index_fill(0, keep[layer], 0).sum()
    share = _OF_MEAN / max(1, len(layers))
    if not bool(removed.any() and kl_nats.any()):
        return torch.ones_like(removed)
    factors: Tensor = (kl_nats + share * kl_nats.sum()) / (removed + share * removed.sum())
    return factors
