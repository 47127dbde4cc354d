"""What reaches each down_proj over the calibration tokens, for the baselines that need no gradient.

Plain hooks on transformers' own modules: nothing of the library's scoring is called, since these
methods are what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfprune_fast.models.sites import GatedMLP, parts_of

BATCH = 16


@dataclass(frozen=True)
class Moments:
    """Of each neuron's activation a, the input of down_proj, over all calibration tokens."""

    tokens: int
    sums: Tensor  # (L, F) float64, Σ a
    squares: Tensor  # (L, F) float64, Σ a²

    @property
    def mean(self) -> Tensor:
        return self.sums / self.tokens

    @property
    def variance(self) -> Tensor:
        """The sample variance, over tokens - 1."""
        return (self.squares - self.sums.square() / self.tokens) / (self.tokens - 1)


def gated_mlps(model: PreTrainedModel) -> list[GatedMLP]:
    """Return the MLP of each layer, or raise ValueError: the baselines are of dense models."""
    parts = parts_of(model)
    if parts.with_experts or len(parts.own_mlps) < len(parts.layers):
        raise ValueError("the baselines are of models with one gated MLP in each layer")
    return list(parts.own_mlps.values())


def moments(model: PreTrainedModel, ids: Tensor) -> Moments:
    """Return the moments of all neurons over sequences ids (N, T)."""
    mlps = gated_mlps(model)
    sums = torch.zeros(len(mlps), mlps[0].width, dtype=torch.float64)
    squares = torch.zeros_like(sums)

    def add(layer: int, act: Tensor) -> None:
        sums[layer] += act.sum(dim=0, dtype=torch.float64)
        squares[layer] += act.double().square().sum(dim=0)

    visit_acts(model, ids, add)
    return Moments(ids.numel(), sums, squares)


def grams(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return Σ_t a_t a_tᵀ of each layer, (F, F) float64, its products in the model's dtype."""
    totals = [torch.zeros(m.width, m.width, dtype=torch.float64) for m in gated_mlps(model)]

    def add(layer: int, act: Tensor) -> None:
        totals[layer] += act.T @ act

    visit_acts(model, ids, add)
    return totals


@torch.no_grad()
def visit_acts(model: PreTrainedModel, ids: Tensor, visit: Callable[[int, Tensor], None]) -> None:
    """Call `visit(layer, a)` with what reaches each down_proj, (tokens, F), a batch at a time."""

    def hook(layer: int, _: nn.Module, inputs: tuple[Tensor]) -> None:
        visit(layer, inputs[0].flatten(0, -2))

    handles = [
        mlp.down.register_forward_pre_hook(partial(hook, layer))
        for layer, mlp in enumerate(gated_mlps(model))
    ]
    try:
        for batch in ids.split(BATCH):
            parts_of(model).decoder(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
