"""Walks through the model with all calibration tokens at once, a layer at a time.

`removal_costs` goes through the dense model, and asks of each layer's MLP what removing its neurons
would cost (`obs.py`). `refit` goes through the dense model and the pruned one side by side. With h
the pruned model's residual stream before a layer's MLP, a its act there, kept neurons only, and x
the dense model's residual stream behind the same MLP, down_proj becomes the V that minimises

    mean‖x - h - V a‖² + λ·mean(a²)·‖V - W‖²

over the tokens, so that a layer makes up for what the layers before it have lost, as far as its
kept neurons can. (Fitting V a to the dense MLP's own output instead leaves their error in the
stream: on the models of bench/fidelity.py, 15 to 20 % more KL.)

One layer's second moments are in memory at a time, and the streams: two tensors of all tokens by
hidden_size, on the host if the model is on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.data.batches import MicroBatch, as_batches, micro_batch, numbered
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import acts_of
from hfprune_fast.errors import CalibrationError
from hfprune_fast.models.sites import check_keep
from hfprune_fast.pruning.selection import Keep
from hfprune_fast.scoring.costs import Done, _check, _maths, _nothing, _put_away, _rows
from hfprune_fast.scoring.obs import least_squares

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Refitted:
    """A pruned model's refitted down_proj, and its hidden states where the head would read them."""

    weights: dict[int, Tensor]  # {layer: (D, width)} in the model's dtype, on the CPU
    hidden: list[Tensor]  # of the batches that were not fitted to: (B, T, D) each, on the CPU


@torch.no_grad()
def refit(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    keeps: Sequence[Keep],
    *,
    held_out: int = 0,
    done: Done = _nothing,
) -> tuple[list[Refitted], list[Tensor]]:
    """Refit down_proj of each pruned model, all beside one dense model.

    Args:
        model: the dense model, entered.
        batches: the calibration.
        keeps: {layer: kept neurons} of each pruned model.
        held_out: how many of the batches, the last ones, only run through, without being fitted to.
        done: called with the tokens that were worked on, a layer at a time.

    Returns:
        A `Refitted` of each keep, and the dense model's hidden states of the held-out batches.

    Raises:
        NumericsError: NaN or inf in a layer's activations.
    """
    layers = len(model.parts.layers)
    fitted = len(batches) - held_out
    share = layers * (1 + 2 * len(keeps))  # the dense model goes through once, the pruned twice
    dense = [_put_away(model.begin(batch)) for batch in batches]
    streams = [list(dense) for _ in keeps]
    results = [Refitted({}, []) for _ in keeps]
    for layer in range(layers):
        with model.weights_of(layer, then=layer + 1):
            for i, batch in enumerate(batches):
                dense[i] = _put_away(model.run(layer, dense[i].to(model.device), batch))
                done(batch.tokens / share)
            for keep, stream, result in zip(keeps, streams, results, strict=True):
                cut = _CutLayer(model, layer, keep[layer].to(model.device))
                for i, batch in enumerate(batches[:fitted]):
                    cut.fit_to(dense[i], stream[i], batch)
                    done(batch.tokens / share)
                weight = cut.solve(sum(batch.tokens for batch in batches[:fitted]))
                result.weights[layer] = weight.cpu()
                for i, batch in enumerate(batches):
                    stream[i] = _put_away(cut.run(stream[i], batch, weight))
                    done(batch.tokens / share * (1 if i < fitted else 2))
    with model.weights_of(layers, then=0):
        for i in range(fitted, len(batches)):
            dense[i] = _put_away(model.parts.norm(dense[i].to(model.device)))
            for stream, result in zip(streams, results, strict=True):
                result.hidden.append(_put_away(model.parts.norm(stream[i].to(model.device))))
    return results, dense[fitted:]


def refit_down_proj(
    model: PreTrainedModel, batches: Iterable[Any], keep: Keep
) -> dict[int, Tensor]:
    """Return {layer: (D, width)} what down_proj of a loaded model becomes when it is cut to `keep`.

    Args:
        model: the dense model, which is left as it is; see `hf.prune` for what comes next.
        batches: the calibration, as `hf.score` takes it.
        keep: {layer: sorted int64 indices}, of `hf.select`.

    The fit is that of `refit`; 8 tokens or more for each kept neuron generalise well.

    Raises:
        ArgumentError: keep does not fit the model.
        CalibrationError: no batch, or ids that the model does not have.
        NumericsError: NaN or inf in a weight or a layer's activations, named.
    """
    with ResidentModel(model) as dense:
        items = numbered(micro_batch(batch, dense.vocab) for batch in as_batches(batches))
        if not items:
            raise CalibrationError("no token batches to refit on; expected at least one sequence")
        keep = check_keep(keep, [mlp.down.in_features for mlp in dense.parts.mlps])
        (result,), _ = refit(dense, items, [keep])
    return result.weights


class _CutLayer:
    """A layer of a pruned model: the dense one's, but for its down_proj."""

    def __init__(self, model: ResidentModel, layer: int, kept: Tensor) -> None:
        self._model, self._layer, self._kept = model, layer, kept
        self._mlp = model.parts.mlps[layer]
        self._dense_weight = self._mlp.down.weight[:, kept]
        width = len(kept)
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=model.device)
        self._cross = self._gram.new_zeros(self._dense_weight.shape)

    def fit_to(self, dense: Tensor, stream: Tensor, batch: MicroBatch) -> None:
        """Take what the dense stream has more than the pruned one before its MLP."""
        model, maths = self._model, _maths(self._model)
        with acts_of(self._mlp, silent=True) as seen:
            before_mlp = model.run(self._layer, stream.to(model.device), batch)
        missing = dense.to(model.device, maths) - before_mlp.to(maths)
        if self._mlp.down.bias is not None:
            missing -= self._mlp.down.bias
        act, missing = _rows(seen[0][..., self._kept], batch).to(maths), _rows(missing, batch)
        self._gram += act.t() @ act
        self._cross += missing.t() @ act

    def solve(self, tokens: int) -> Tensor:
        """Return the refitted (D, width) weight, rounded to the model's dtype."""
        _check(self._gram, self._layer)
        gram, cross = self._gram.div_(tokens), self._cross.div_(tokens)
        del self._gram, self._cross
        return least_squares(gram, cross, self._dense_weight).to(self._model.dtype)

    def run(self, stream: Tensor, batch: MicroBatch, weight: Tensor) -> Tensor:
        """Return the pruned stream behind the layer."""

        def instead(down: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            return nn.functional.linear(args[0][..., self._kept], weight, self._mlp.down.bias)

        handle = self._mlp.down.register_forward_hook(instead)
        try:
            return self._model.run(self._layer, stream.to(self._model.device), batch)
        finally:
            handle.remove()
