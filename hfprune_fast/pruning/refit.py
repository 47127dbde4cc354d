"""Refit down_proj of pruned models to the dense model by least squares, a layer at a time.

`refit` runs the dense model and the pruned ones side by side, with all calibration tokens at once.
With h the pruned model's residual stream before a layer's MLP, a its act there (kept neurons only),
and x the dense model's residual stream after the same MLP, down_proj becomes the V that minimises

    mean‖x - h - V a‖² + λ Σ_j mean(a_j²)·‖v_j - w_j‖²

over the tokens, so that a layer corrects the error of the layers before it, as far as its kept
neurons can; λ is chosen on an eighth of the sequences (`normal_equations`). (Fitting V a to the
dense MLP's own output instead leaves their error in the stream: on the models of bench/fidelity, 15
to 20 % more KL.) Where a family scales the MLP's output before it is added, x - h is divided by the
scale.

Where an RMS norm with gains g follows the MLP, the norm is taken as linear, with the root mean
square of the dense MLP's output y at each token. What is minimised, beside the ridge, is

    mean‖u (g ∘ V a) - (x - h)‖² + μ·mean(g²)·mean‖u (V a - y)‖²        u = 1 / rms(y)

which is least squares for each row of V, over tokens with weights u²; a row's ridge is in
proportion to its terms. The second term keeps V a at y where a gain is so small that V would have
to grow to correct the stream. (Fitting V a to y alone has 10 to 18 % more KL on the small OLMo 2
and Gemma 2 of bench/results/NOTES.md.) Where the output is scaled too, g has the scale in it.

A pruned layer runs once a batch (`pruned_layer`), except on a GPU, and where it has experts. The
second moments of one layer are in memory at a time, on a CPU its kept neurons' acts of all tokens,
and the streams: for the dense and each pruned model a tensor of all tokens by hidden_size, on the
host if a GPU has no room for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch, as_batches, token_data
from hfprune_fast.engine.layerwise import (
    OnProgress,
    ResidentModel,
    each_batch,
    for_each_layer,
    no_progress,
    own_modes,
)
from hfprune_fast.engine.mlp_hooks import outputs_of
from hfprune_fast.models.kept import kept_experts
from hfprune_fast.models.plain import plain_model
from hfprune_fast.models.sites import SiteKey, check_keep
from hfprune_fast.models.spec import spec_of
from hfprune_fast.pruning.pruned_layer import PrunedLayer, adds_its_mlp
from hfprune_fast.pruning.reconstruct import STEPS, TrainingRows
from hfprune_fast.pruning.refit_experts import PrunedExperts
from hfprune_fast.pruning.selection import Keep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Refitted:
    """A pruned model's refitted down_proj, and its final hidden states, which the head reads."""

    # {layer or (layer, expert): (D, width)} in the model's dtype, on the CPU; of experts that few
    # tokens chose, none.
    weights: dict[SiteKey, Tensor]
    hidden: list[Tensor]  # of each held-out batch: (B, T, D), on the CPU
    unfitted: int = 0  # experts that too few tokens chose, so that they stay as they are
    # {layer: weights of gate and up, or of both in one}, of layers that were reconstructed, on the
    # CPU, as (width, D) or (2 · width, D).
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    untrained: int = 0  # layers that could not be reconstructed
    unimproved: int = 0  # layers of which no step of a reconstruction was better than the refit


@torch.no_grad()
def refit(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    keeps: Sequence[Keep],
    *,
    held_out: int = 0,
    reconstruct: Mapping[int, Tensor] | None = None,
    on_progress: OnProgress = no_progress,
) -> tuple[list[Refitted], list[Tensor]]:
    """Refit down_proj of several pruned models of one dense model.

    Args:
        model: the dense model, entered.
        batches: the calibration; the last `held_out` are run but not fitted to.
        keeps: {layer: kept neurons} of each pruned model.
        reconstruct: train gate, up and down of each layer after its refit, see `reconstruct`;
            {layer: C}, of the layers of which it is known. None trains nothing.
        on_progress: called with the tokens processed, a layer at a time.

    Returns:
        A `Refitted` of each keep, and the dense model's hidden states of the held-out batches.

    Raises:
        NumericsError: the activations or the stream of a layer hold NaN or inf.
    """
    fitted = len(batches) - held_out
    fitted_tokens = sum(batch.tokens for batch in batches[:fitted])
    trains, metrics = reconstruct is not None, reconstruct or {}
    # A token goes through a layer of the dense model once and of a pruned one twice; training takes
    # as long as two runs more.
    training_runs = 2 if trains else 0
    steps = model.head_unit * (1 + (2 + training_runs) * len(keeps))
    training = training_runs * sum(batch.tokens for batch in batches) / steps
    choosing = _last_eighth(batches[:fitted])
    dense = [model.kept(model.begin(batch)) for batch in batches]
    streams = [list(dense) for _ in keeps]
    results = [Refitted({}, []) for _ in keeps]

    def visit(layer: int) -> None:
        outputs: list[Tensor | None] = [None] * len(batches)  # of the dense MLP, for a norm
        alone = model.parts.experts[layer] is None
        is_known = alone and adds_its_mlp(model, layer, dense[0], batches[0])
        # To copy acts from a GPU and back takes longer than to make them again.
        keeps_acts = is_known and model.device.type == "cpu"
        mlp = model.parts.mlps[layer] if model.parts.family.norm_behind and alone else None
        for i, batch in each_batch(batches, on_progress, steps):
            with ExitStack() as hooks:
                seen = hooks.enter_context(outputs_of(mlp.down)) if mlp is not None else []
                dense[i] = model.kept(model.run(layer, dense[i].to(model.device), batch))
            outputs[i] = model.kept(seen[0]) if seen else None
        for keep, stream, result in zip(keeps, streams, results, strict=True):
            pruned: PrunedLayer | PrunedExperts
            rows = TrainingRows.of(model, fitted_tokens) if trains and is_known else None
            if alone:
                pruned = PrunedLayer(model, layer, keep[layer], keeps_acts=keeps_acts, rows=rows)
            else:
                pruned = PrunedExperts(model, layer, keep)
            for i, batch in each_batch(batches, on_progress, steps):
                if i < fitted:
                    added = pruned.add(i, dense[i], outputs[i], stream[i], batch, choosing[i])
                    stream[i] = model.kept(added)
            weights = pruned.solve()
            result.weights |= {site: weight.cpu() for site, weight in weights.items()}
            result.unfitted += pruned.unfitted
            if isinstance(pruned, PrunedLayer) and rows is not None:
                trained = pruned.train(metrics.get(layer), partial(on_progress, training / STEPS))
                if trained is None:
                    result.unimproved += 1
                else:
                    result.weights[layer] = trained[0].cpu()
                    result.rows[layer] = [weight.cpu() for weight in trained[1]]
            elif trains:
                result.untrained += 1
                on_progress(training)
            for i, batch in each_batch(batches, on_progress, steps):
                stream[i] = model.kept(pruned.finish(i, stream[i], batch))

    for_each_layer(model, visit, then=model.head_unit)
    with model.weights_of(model.head_unit, then=0):
        for stream, result in zip(streams, results, strict=True):
            result.hidden = [model.normed(hidden).cpu() for hidden in stream[fitted:]]
        return results, [model.normed(hidden).cpu() for hidden in dense[fitted:]]


def _last_eighth(batches: Sequence[MicroBatch]) -> list[int]:
    """Return how many of each batch's sequences are of the last eighth, which choose the ridges."""
    sizes = [len(batch.lengths) for batch in batches]
    begin = sum(sizes) - sum(sizes) // 8
    return [
        max(0, min(size, end - begin)) for size, end in zip(sizes, accumulate(sizes), strict=True)
    ]


@own_modes()
def refit_down_proj(
    model: PreTrainedModel, batches: Iterable[Any], keep: Keep
) -> dict[Any, Tensor]:
    """Return {layer: (D, width)}, the refitted down_proj of a loaded model pruned to `keep`.

    Of a model with experts also {(layer, expert): (D, width)} of those that enough tokens chose,
    see `pruning.refit_experts`.

    Args:
        model: the dense model, which is not changed; pass the result to `hf.prune`.
        batches: the calibration, as `hf.score` takes it.
        keep: {layer: sorted int64 indices}, of `hf.select`.

    The fit is that of `refit`; 8 tokens or more for each kept neuron generalise well.

    Raises:
        ArgumentError: keep does not fit the model, or the model is not plain.
        CalibrationError: there is no batch, or ids are not in the model's vocabulary.
        NumericsError: a weight or a layer's activations, named, hold NaN or inf.
    """
    with ResidentModel(plain_model(model, "refit")) as dense:
        items = token_data(as_batches(batches), dense.vocab).batches
        keep = check_keep(keep, dense.parts.widths)
        kept_experts(keep, spec_of(dense.model), dense.parts.family)
        (result,), _ = refit(dense, items, [keep])
    return result.weights
