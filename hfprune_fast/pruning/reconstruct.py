"""Reconstruct a pruned MLP: train gate, up and down of its kept neurons to give the dense stream.

A refit solves for down_proj alone and takes the acts of the kept neurons as they are. Here the
whole MLP of one layer is trained, nonlinearity included, after the refit and from its result. With
h the pruned model's residual stream before the MLP, x the MLP's input there, and y the dense
model's stream after it, 200 steps of Adam minimise, over the calibration's tokens,

    Σ_t u_t e_tᵀ (C / mean(diag C) + ε I) e_t / Σ_t u_t        e = y - h - mlp(x), u = 1 / mean(y²)

C is the covariance of the gradient of log p at the MLP's output: how much each direction of the
stream matters to the model's output, as the removal costs have it (`scoring.obs`). Where it is not
known, or a norm follows the MLP, all directions count alike. u is what the next norm divides by, so
that a few tokens of huge activations do not outweigh the others.

A step takes 2048 tokens, or as many as make eight passes over a shorter text. An eighth of the
tokens is held out, and the weights that are best on it are kept, the refit's own among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import outputs_of, replaced_weights
from hfprune_fast.engine.planner import RECONSTRUCTED_AT_ONCE
from hfprune_fast.models.sites import GatedMLP
from hfprune_fast.scoring.moments import moments_dtype, token_rows

STEPS = 200
_RATE = 0.01  # of a matrix's root mean square, which the learning rate is in proportion to
_BETAS = (0.9, 0.99)
_CHECKS = 8  # of the held-out error in a training
_HELD_OUT_PART = 8
_PASSES = 8  # over the tokens, at most
_PLAIN = 0.1  # ε

Weights = dict[nn.Linear, Tensor]  # of a narrower MLP
OnStep = Callable[[], object]  # called after each of `STEPS` steps


@dataclass
class TrainingRows:
    """What an MLP reads and shall add to the stream, and how much each token counts; on the CPU."""

    inputs: Tensor  # (tokens, D)
    targets: Tensor  # (tokens, D)
    weights: Tensor  # (tokens, 1)
    ends: list[int] = field(default_factory=lambda: [0])  # of the batches, after a first 0

    @classmethod
    def of(cls, model: ResidentModel, tokens: int) -> TrainingRows:
        """Make room for so many tokens."""
        shape = tokens, model.parts.head.weight.shape[1]
        inputs, targets = (torch.empty(shape, dtype=moments_dtype(model)) for _ in range(2))
        return cls(inputs, targets, inputs.new_empty(tokens, 1))

    def append(self, inputs: Tensor, missing: Tensor, after: Tensor, batch: MicroBatch) -> None:
        """Add a batch's tokens.

        Args:
            inputs: what gate reads in the pruned model.
            missing: what the layer shall add to the stream, (B, T, D).
            after: the dense model's residual stream after the layer, (B, T, D).
        """
        u = 1 / after.square().mean(dim=-1, keepdim=True)
        parts = inputs.view(after.shape), missing, u
        begin, end = self.ends[-1], self.ends[-1] + batch.tokens
        for rows, part in zip((self.inputs, self.targets, self.weights), parts, strict=True):
            rows[begin:end] = token_rows(part, batch)
        self.ends.append(end)

    @property
    def batches(self) -> int:
        return len(self.ends) - 1

    def inputs_of(self, i: int, batch: MicroBatch) -> Tensor:
        """Return what the MLP reads of a batch, (B, T, D), 0 at padding."""
        rows = self.inputs[self.ends[i] : self.ends[i + 1]]
        if batch.token_mask is None:
            return rows.view(*batch.ids.shape, -1)
        inputs = rows.new_zeros(*batch.ids.shape, rows.shape[1])
        inputs[batch.token_mask] = rows
        return inputs


class Training:
    """The training of a narrowed MLP.

    Args:
        model: the dense model, with the layer's weights in place.
        metric: C, (D, D), or None.
    """

    def __init__(
        self, model: ResidentModel, layer: int, rows: TrainingRows, metric: Tensor | None
    ) -> None:
        self._model, self._layer, self._rows = model, layer, rows
        self._mlp = model.parts.own_mlps[layer]
        self._dtype = moments_dtype(model)
        tokens = len(rows.inputs)
        self._trained_tokens = max(1, tokens - max(1, tokens // _HELD_OUT_PART))
        self._metric = None
        if metric is not None and not model.parts.family.norm_behind:
            wide = metric.to(model.device, self._dtype)
            self._metric = wide / wide.diagonal().mean()
            self._metric.diagonal().add_(_PLAIN)

    def train(
        self,
        weights: Mapping[nn.Linear, Tensor],
        biases: Mapping[nn.Linear, Tensor],
        on_step: OnStep,
    ) -> Weights | None:
        """Return the trained weights, rounded to the model's dtype; None if no step was better.

        Args:
            weights, biases: those to begin with.
        """
        trained = {
            linear: nn.Parameter(weight.to(self._dtype, copy=True))
            for linear, weight in weights.items()
        }
        at_once = max(1, min(RECONSTRUCTED_AT_ONCE, _PASSES * self._trained_tokens // STEPS))
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
        with torch.enable_grad(), replaced_weights(trained, biases, self._dtype):
            best, lowest = None, self._held_out_error()
            for step in range(1, STEPS + 1):
                loss = self._error(torch.randint(self._trained_tokens, (at_once,), generator=drawn))
                grads = torch.autograd.grad(loss, list(trained.values()))
                for parameter, grad in zip(trained.values(), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
                schedule.step()
                on_step()
                is_checked = step % (STEPS // _CHECKS) == 0
                if is_checked and (found := self._held_out_error()) < lowest:
                    best, lowest = _copies(trained), found
        if best is None:
            return None
        return {linear: weight.to(self._model.dtype) for linear, weight in best.items()}

    def _error(self, rows: Tensor | slice) -> Tensor:
        of_all = self._rows.inputs, self._rows.targets, self._rows.weights
        x, y, u = (part[rows].to(self._model.device) for part in of_all)
        output = mlp_output(self._mlp, x[None])
        missing = y - self._model.parts.added(self._layer, output)[0]
        weighed = missing if self._metric is None else missing @ self._metric
        return ((missing * weighed).mean(dim=1, keepdim=True) * u).sum() / u.sum()

    @torch.no_grad()
    def _held_out_error(self) -> float:
        return float(self._error(slice(self._trained_tokens, None)))


def mlp_output(mlp: GatedMLP, x: Tensor) -> Tensor:
    """Return what down_proj returns for the MLP's input."""
    with outputs_of(mlp.down) as outputs:
        mlp.module(x)
    return outputs[0]


def _copies(weights: Mapping[nn.Linear, Tensor]) -> Weights:
    return {linear: weight.detach().clone() for linear, weight in weights.items()}
