"""A layer of a pruned model that is refitted: second moments, solve, and the stream behind it.

Each calibration batch goes through the layer once, with the MLP narrowed to the neurons that stay
and its output 0. That gives the residual stream before the MLP, and the acts that down_proj is
fitted to; when it is known, what it makes of the acts is added to the stream. `pruning.refit` has
the equations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import inputs_of, replaced_weights, silent_mlp
from hfprune_fast.models.sites import GatedMLP, SiteKey, rows_of
from hfprune_fast.pruning.normal_equations import NormalEquations
from hfprune_fast.pruning.reconstruct import OnStep, Training, TrainingRows, Weights, mlp_output
from hfprune_fast.scoring.moments import moments_dtype, token_rows

_PULL = 0.01  # μ
_TRIED_TOKENS, _TOLERANCE = 8, 1e-3


class PrunedLayer:
    """A layer of a pruned model: the dense model's, with its MLP narrowed.

    Args:
        model: the dense model, with the layer's weights in place.
        kept: the neurons that stay.
        keeps_acts: keep them until the weights are known, of a layer that `adds_its_mlp`;
            otherwise the layer runs once more, with the refitted weights.
        rows: takes what the MLP is trained by, of such a layer too; no acts are kept then.
    """

    unfitted = 0  # experts

    def __init__(
        self,
        model: ResidentModel,
        layer: int,
        kept: Tensor,
        *,
        keeps_acts: bool,
        rows: TrainingRows | None = None,
    ) -> None:
        self._model, self._layer = model, layer
        self._keeps_acts, self._rows = keeps_acts, rows
        self._mlp = model.parts.own_mlps[layer]
        self._weights, self._biases = _narrowed(self._mlp, kept.to(model.device))
        self._equations = NormalEquations(self._weights[self._mlp.down])
        self._acts: dict[int, Tensor] = {}  # of each batch

    def add(
        self,
        i: int,
        dense: Tensor,
        output: Tensor | None,
        stream: Tensor,
        batch: MicroBatch,
        held_out: int,
    ) -> Tensor:
        """Add a batch's acts, and what down_proj shall return, to the least squares.

        Args:
            i: the batch's number.
            dense: the dense model's residual stream after the layer.
            output: what the dense model's down_proj returns, where a norm follows; else None.
            stream: the pruned model's residual stream before the layer.
            held_out: so many of the last sequences choose the ridge.

        Returns:
            The stream that `finish` takes.
        """
        model, dtype = self._model, moments_dtype(self._model)
        with self._narrow(), inputs_of(self._mlp.gate) as inputs, silent_mlp(self._mlp) as acts:
            before_mlp = model.run(self._layer, stream.to(model.device), batch)
        after = dense.to(model.device).to(dtype)  # cast there: fewer bytes are moved
        missing = after - before_mlp.to(dtype)
        if output is None:
            target, weights = missing / model.parts.output_scale(self._layer), None
        else:
            target, weights = self._behind(output.to(model.device), missing)
        if self._mlp.down.bias is not None:
            target = target - self._mlp.down.bias
        act, target = token_rows(acts[0], batch), token_rows(target, batch)
        counts = None if weights is None else token_rows(weights, batch)
        tokens = sum(batch.lengths[len(batch.lengths) - held_out :])
        self._equations.add(act, target, counts, held_out=tokens)
        if self._rows is not None:
            self._rows.append(inputs[0], missing, after, batch)
        elif self._keeps_acts:
            self._acts[i] = acts[0]
        else:
            return stream
        return before_mlp

    def _behind(self, output: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Return what down_proj shall return in front of a norm (B, T, D), and weights (B, T, 1).

        Args:
            output: y, what the dense model's returns.
            missing: x - h, what the layer shall add to the stream.
        """
        parts = self._model.parts
        norm = parts.layers[self._layer].get_submodule(parts.family.norm_behind)
        # Of equal numbers, so large that the norm's epsilon does not count.
        gains = norm(torch.full_like(output[:1, :1], 1e3)).to(missing.dtype)
        normed, wide = norm(output).to(missing.dtype), output.to(missing.dtype)
        scale = parts.output_scale(self._layer)
        gains, normed = gains * scale, normed * scale
        share = gains * wide
        length = share.square().sum(-1, keepdim=True)
        rms = length / (normed * share).sum(-1, keepdim=True)  # normed = share / rms
        pull = _PULL * gains.square().mean()
        target = (gains * rms * missing + pull * wide) / (gains.square() + pull)
        counts = length > 0  # a token for which the MLP says nothing has no direction to follow
        return target.where(counts, 0), (1 / rms).square().where(counts, 0)

    def solve(self) -> dict[SiteKey, Tensor]:
        """Return the refitted (D, width) weight, rounded to the model's dtype."""
        fitted = self._equations.solve(self._layer).to(self._model.dtype)
        self._weights[self._mlp.down] = fitted
        return {self._layer: fitted}

    def train(self, metric: Tensor | None, on_step: OnStep) -> tuple[Tensor, list[Tensor]] | None:
        """Train the MLP from the refit on, by `rows`; return its weights in the model's dtype.

        Args:
            metric: see `reconstruct.Training`.
            on_step: called after each of `reconstruct.STEPS` steps.

        Returns:
            down_proj's (D, K), and gate's and up's (K, D) or both in one (2 · K, D); None if no
            step was better than the refit.
        """
        assert self._rows is not None
        training = Training(self._model, self._layer, self._rows, metric)
        trained = training.train(self._weights, self._biases, on_step)
        if trained is None:
            return None
        self._weights = trained
        down = self._weights[self._mlp.down]
        return down, [each for each in self._weights.values() if each is not down]

    def finish(self, i: int, stream: Tensor, batch: MicroBatch) -> Tensor:
        """Return the pruned stream after the layer, by the weights that were found.

        Args:
            stream: what `add` returned; of a batch that was not added, the stream before the layer.
        """
        model, down = self._model, self._mlp.down
        if self._rows is not None and i < self._rows.batches:
            x = self._rows.inputs_of(i, batch).to(model.device, model.dtype)
            with self._narrow():
                output = mlp_output(self._mlp, x)
        elif i in self._acts:
            output = nn.functional.linear(self._acts.pop(i), self._weights[down], down.bias)
        else:
            with self._narrow():
                return model.run(self._layer, stream.to(model.device), batch)
        return stream.to(model.device) + model.parts.added(self._layer, output)

    def _narrow(self) -> AbstractContextManager[None]:
        return replaced_weights(self._weights, self._biases, self._model.dtype)


@torch.no_grad()
def adds_its_mlp(model: ResidentModel, layer: int, stream: Tensor, batch: MicroBatch) -> bool:
    """Whether a layer adds its MLP's output to the residual stream as its family does.

    A few tokens go through it, with the MLP and without.

    Args:
        stream: the residual stream before the layer, of `batch`.
    """
    mlp, tokens = model.parts.own_mlps[layer], min(_TRIED_TOKENS, batch.lengths[0])
    few = MicroBatch(batch.ids[:1, :tokens], (tokens,))
    hidden = stream[:1, :tokens].to(model.device)
    with silent_mlp(mlp) as acts:
        before_mlp = model.run(layer, hidden, few)
    after = model.run(layer, hidden, few)
    added = model.parts.added(layer, mlp.down(acts[0])).to(moments_dtype(model))
    error = (after.to(added.dtype) - before_mlp.to(added.dtype) - added).norm()
    rounding = torch.finfo(after.dtype).eps * after.to(added.dtype).norm()
    return bool(error <= _TOLERANCE * added.norm() + rounding)


def _narrowed(mlp: GatedMLP, kept: Tensor) -> tuple[Weights, Weights]:
    """Return the weights of a pruned MLP, and the biases that are cut."""
    weights, biases = Weights(), Weights()
    for linear, axis, times in mlp.linears:
        rows = rows_of(kept, mlp.width, times)
        weights[linear] = linear.weight.detach().index_select(axis, rows)
        if linear is not mlp.down and linear.bias is not None:
            biases[linear] = linear.bias.detach()[rows]
    return weights, biases
