"""FLAP, and Wanda-SP, which its paper compares it with: both need forward passes alone.

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
arXiv 2312.11983; Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
arXiv 2306.11695. In our own words: no code is taken from either.

FLAP scores input channel j of down_proj, W (D, F), by how much its activation a_j fluctuates
("WIFV", weighted input feature variance) and how much of that the output sees:

    S_j = 1/(N-1) Σ_n (a_nj - ā_j)² · ‖W_:j‖²

It compares channels of all layers by S standardised in each layer, (S - E[S]) / std(S), under one
threshold, and gives down_proj the mean of what it loses as a bias: b = Σ_removed ā_j W_:j.

What the paper leaves open, and what is done here:
- The N samples of the variance are the calibration tokens, all of weight 1. Its released code
  updates a mean of sequences as it goes, which depends on their order.
- Only MLPs are pruned. Its threshold would share a budget with attention's heads; here it is set so
  that as many neurons are removed in all as by every other variant. A layer keeps one neuron.
- Statistics are of the dense model's own activations, as FLAP's are.

Wanda-SP scores a channel by Wanda's |W_ij| · ‖a_j‖₂ summed over the column, and removes as many in
every layer; nothing compensates. Its released code lets each layer see the output of the layers
pruned before it; here it sees the dense model's, so that all scores come from one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from activations import Moments
from torch import Tensor


def flap(moments: Moments, down: Sequence[Tensor]) -> Tensor:
    """Return FLAP's standardised scores (L, F), to be compared between layers."""
    return standardised(fluctuation(moments, down))


def fluctuation(moments: Moments, down: Sequence[Tensor]) -> Tensor:
    """Return the variance of each activation times the squared norm of its column, (L, F)."""
    norms = torch.stack([weight.double().square().sum(dim=0) for weight in down])
    return moments.variance * norms


def standardised(scores: Tensor) -> Tensor:
    """Return (S - E[S]) / sqrt(E[(S - E[S])²]) of each layer's scores."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt()


def compensating_bias(
    moments: Moments, down: Sequence[Tensor], keep: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Return what each down_proj loses on average, (D,) float64, to be added to its output."""
    biases = {}
    for layer, kept in keep.items():
        lost = moments.mean[layer].clone()
        lost[kept] = 0
        biases[layer] = down[layer].double() @ lost
    return biases


def wanda_sp(moments: Moments, down: Sequence[Tensor]) -> Tensor:
    """Return Σ_i |W_ij| · ‖a_j‖₂ of each neuron, (L, F)."""
    sums = torch.stack([weight.double().abs().sum(dim=0) for weight in down])
    return sums * moments.squares.sqrt()
