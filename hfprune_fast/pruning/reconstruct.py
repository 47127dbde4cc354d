"""Reconstruct a pruned MLP: train gate, up and down of its kept neurons to give the dense stream.

A refit fits down_proj alone, for which the acts of the kept neurons are what they are. Here the
whole MLP of one layer is trained, nonlinearity included, after the refit and from its result. With
h the pruned model's residual stream before the MLP, x the MLP's input there, and y the dense
model's stream after it, Adam minimises

    Σ_t u_t e_tᵀ (C / mean(diag C) + ε I) e_t / Σ_t u_t        e = y - h - mlp(x), u = 1 / mean(y²)

over the calibration's tokens, a step over at most 2048 of them, and so few of a short text that all
are seen eight times. C, the covariance of the gradient
of log p at the MLP's output, says how much each direction of the stream matters to the output, as
the removal costs have it (`scoring.obs`); it is 0 where it is not known, or a norm follows the MLP.
u is what the next norm divides by, so that a few tokens of huge activations do not count for all.
An eighth of the tokens is held out, and the weights that are best on it are kept, the refit's own
among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import acts_of, inputs_of, replaced_weights
from hfprune_fast.engine.planner import RECONSTRUCTED_AT_ONCE
from hfprune_fast.models.sites import GatedMLP, rows_of
from hfprune_fast.scoring.moments import token_rows

STEPS = 200
_RATE = 0.01  # of a matrix's root mean square, which the learning rate is in proportion to
_BETAS = (0.9, 0.99)
_CHECKS = 8  # of the held-out error in a training
_HELD_OUT_PART = 8
_PASSES = 8  # over the tokens, at most
_TOLERANCE = 1e-3
_PLAIN = 0.1  # ε

Weights = dict[nn.Linear, Tensor]  # of a narrower MLP


@dataclass
class _Rows:
    """What an MLP reads and shall add to the stream, and how much each token counts; on the CPU."""

    inputs: Tensor  # (tokens, D)
    targets: Tensor  # (tokens, D)
    weights: Tensor  # (tokens, 1)
    filled: int = 0

    def append(self, *parts: Tensor) -> None:
        end = self.filled + len(parts[0])
        for rows, part in zip((self.inputs, self.targets, self.weights), parts, strict=True):
            rows[self.filled : end] = part
        self.filled = end


class Reconstruction:
    """A layer of a pruned model whose MLP is trained.

    Args:
        model: the dense model, with the layer's weights in place.
        kept: the neurons that stay.
        down: (D, K), their refitted down_proj.
        metric: C, (D, D), or None.
        tokens: how many will be added.
    """

    def __init__(
        self,
        model: ResidentModel,
        layer: int,
        kept: Tensor,
        down: Tensor,
        metric: Tensor | None,
        tokens: int,
    ) -> None:
        self._model, self._layer = model, layer
        self._mlp = model.parts.own_mlps[layer]
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self._weights, self._biases = _narrowed(self._mlp, kept, down)
        shape = tokens, len(down)
        inputs, targets = (torch.empty(shape, dtype=self._dtype) for _ in range(2))
        self._rows = _Rows(inputs, targets, inputs.new_empty(tokens, 1))
        self._metric = None
        if metric is not None and not model.parts.family.norm_behind:
            wide = metric.to(model.device, self._dtype)
            self._metric = wide / wide.diagonal().mean()
            self._metric.diagonal().add_(_PLAIN)
        self._scale: float | None = None

    @torch.no_grad()
    def add(self, dense: Tensor, stream: Tensor, batch: MicroBatch) -> None:
        """Add a batch's tokens.

        Args:
            dense: the dense model's residual stream after the layer, (B, T, D).
            stream: the pruned model's before it.
        """
        model, stream = self._model, stream.to(self._model.device)
        with inputs_of(self._mlp.gate) as seen, acts_of(self._mlp, silent=True):
            before_mlp = model.run(self._layer, stream, batch)
        after = dense.to(model.device, self._dtype)
        if self._scale is None:
            self._scale = self._scale_of_output(stream, batch, before_mlp, seen[0])
        missing = after - before_mlp.to(self._dtype)
        u = 1 / after.square().mean(dim=-1, keepdim=True)
        tensors = seen[0].view(after.shape), missing, u
        self._rows.append(*(token_rows(tensor, batch).to(self._dtype) for tensor in tensors))

    @property
    def is_known(self) -> bool:
        """Whether the layer adds its MLP's output to the stream as it is understood here."""
        return bool(self._scale)

    @property
    def down(self) -> Tensor:
        """The (D, K) weight of down_proj."""
        return self._weights[self._mlp.down]

    @property
    def rows(self) -> list[Tensor]:
        """The (K, D) weights of gate and up; of both in one, (2 · K, D)."""
        return [weight for linear, weight in self._weights.items() if linear is not self._mlp.down]

    def train(self, on_step: Callable[[], object]) -> None:
        """Train the weights, rounded to the model's dtype in the end."""
        inputs, targets, weights = self._rows.inputs, self._rows.targets, self._rows.weights
        del self._rows
        device = self._model.device
        trained = {
            linear: nn.Parameter(weight.to(self._dtype)) for linear, weight in self._weights.items()
        }
        held_out = max(1, len(inputs) // _HELD_OUT_PART)
        known = max(1, len(inputs) - held_out)
        at_once = max(1, min(RECONSTRUCTED_AT_ONCE, _PASSES * known // STEPS))

        def error(rows: Tensor | slice) -> Tensor:
            x, y, u = (part[rows].to(device) for part in (inputs, targets, weights))
            missing = y - self._added(x)
            weighed = missing if self._metric is None else missing @ self._metric
            return ((missing * weighed).mean(dim=1, keepdim=True) * u).sum() / u.sum()

        def held_out_error() -> float:
            with torch.no_grad():
                return float(error(slice(known, None)))

        optimizer = torch.optim.Adam(
            [
                {"params": [each], "lr": _RATE * float(each.detach().square().mean().sqrt())}
                for each in trained.values()
            ],
            betas=_BETAS,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2
        )
        drawn = torch.Generator().manual_seed(self._layer)
        with torch.enable_grad(), replaced_weights(trained, self._biases, self._dtype):
            best, lowest = _copies(trained), held_out_error()
            for step in range(1, STEPS + 1):
                loss = error(torch.randint(known, (at_once,), generator=drawn))
                grads = torch.autograd.grad(loss, list(trained.values()))
                for parameter, grad in zip(trained.values(), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
                schedule.step()
                on_step()
                if step % (STEPS // _CHECKS) == 0 and (found := held_out_error()) < lowest:
                    best, lowest = _copies(trained), found
        self._weights = {linear: weight.to(self._model.dtype) for linear, weight in best.items()}

    @torch.no_grad()
    def run(self, stream: Tensor, batch: MicroBatch) -> Tensor:
        """Return the pruned stream after the layer."""
        with replaced_weights(self._weights, self._biases, self._model.dtype):
            return self._model.run(self._layer, stream.to(self._model.device), batch)

    def _added(self, x: Tensor) -> Tensor:
        """Return what the MLP adds to the stream, (n, D), but for `_scale_of_output`."""
        parts = self._model.parts
        output: Tensor = self._mlp.module(x[None])[0]
        if parts.family.norm_behind:
            norm = parts.layers[self._layer].get_submodule(parts.family.norm_behind)
            output = norm(output[None])[0]
        return output if self._scale is None else output * self._scale

    def _scale_of_output(
        self, stream: Tensor, batch: MicroBatch, before_mlp: Tensor, x: Tensor
    ) -> float:
        """Return what the output is multiplied by when it is added; 0 where that is not all."""
        after = self._model.run(self._layer, stream, batch)
        added = (after.to(self._dtype) - before_mlp.to(self._dtype)).flatten(0, 1)
        output = self._added(x.reshape(-1, x.shape[-1])).to(self._dtype)
        scale = float((added * output).sum() / output.square().sum())
        allowed = _TOLERANCE * added.norm() + torch.finfo(after.dtype).eps * after.norm()
        return scale if bool((added - scale * output).norm() <= allowed) else 0.0


def reconstructed(
    model: ResidentModel,
    layer: int,
    kept: Tensor,
    down: Tensor,
    metric: Tensor | None,
    streams: Sequence[tuple[Tensor, Tensor, MicroBatch]],
    on_step: Callable[[], object],
) -> Reconstruction | None:
    """Return a layer with its MLP trained; None where its output is not added as known here.

    Args:
        kept, down, metric: those of `Reconstruction`.
        streams: of each batch, what `Reconstruction.add` takes.
        on_step: called after each of `STEPS` steps.
    """
    tokens = sum(batch.tokens for _, _, batch in streams)
    trained = Reconstruction(model, layer, kept.to(model.device), down, metric, tokens)
    for dense, stream, batch in streams:
        trained.add(dense, stream, batch)
        if not trained.is_known:
            return None
    trained.train(on_step)
    return trained


def _narrowed(mlp: GatedMLP, kept: Tensor, down: Tensor) -> tuple[Weights, dict[nn.Linear, Tensor]]:
    """Return the weights of a pruned MLP, and the biases that are cut."""
    weights, biases = dict[nn.Linear, Tensor](), dict[nn.Linear, Tensor]()
    for linear, axis, times in mlp.linears:
        if linear is mlp.down:
            weights[linear] = down
            continue
        rows = rows_of(kept.cpu(), mlp.width, times).to(linear.weight.device)
        weights[linear] = linear.weight.detach().index_select(axis, rows)
        if linear.bias is not None:
            biases[linear] = linear.bias.detach()[rows]
    return weights, biases


def _copies(weights: Mapping[nn.Linear, Tensor]) -> Weights:
    return {linear: weight.detach().clone() for linear, weight in weights.items()}
