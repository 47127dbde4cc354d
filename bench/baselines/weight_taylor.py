"""LLM-Pruner's and SDMPrune's importance: Taylor terms of the weights, not of the activations.

Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
arXiv 2305.11627; Zhu and Shen, "SDMPrune: Self-Distillation MLP Pruning for Efficient Large
Language Models", 2025, arXiv 2506.11120. In our own words: no code is taken from either. A neuron's
coupled weights are its rows of gate_proj and up_proj and its column of down_proj.

LLM-Pruner, element-wise (its equation 5), summed over the coupled weights w, with L_n the mean
cross entropy of the next tokens of sequence n and g_n = ∂L_n/∂w:

    Σ_w |w · mean_n g_n|

SDMPrune: Σ_w Σ_n |w · g_n|, twice. First of the cross entropy, by which the dense model is cut
lightly; then, of what is left, of

    L = (1-α) · CE + α · mean_t KL(softmax(z_dense/τ) ‖ softmax(z))

in the once-pruned model, with the dense one as the teacher: at the dense model itself and τ = 1 the
KL is at its minimum and has no gradient.

What the papers leave open, and what is done here:
- LLM-Pruner leaves the first and last layers whole, and prunes attention too; here every layer's
  MLP loses as many neurons, as with every other uniform variant. It takes 10 sequences; here all.
- Its second-order term, -½ w² · mean_n g_n² (the Hessian as diagonal Fisher), is left out: on the
  shipped model it is too small beside the first to change what is kept.
- SDMPrune's light cut is from 4 to 3.9 times the hidden size of Llama-3.2-1B, 2.5 % of its neurons,
  at every final size: so much is cut first here as well, of any model.
- α and τ were chosen for each size of Llama-3.2-1B; here those of the nearest part removed.
- Its released script adds the products of the three weights at one hidden position before it takes
  the absolute value, which lets unrelated weights cancel; here it is Σ_w |w · g|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from activations import gated_mlps
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hfprune_fast.models.sites import GatedMLP

Loss = Callable[[PreTrainedModel, Tensor], Tensor]
Gradients = dict[nn.Linear, Tensor]

LIGHT_CUT = 0.025
# {part of the neurons that was removed: (α, τ)}, of SDMPrune's 20, 30 and 40 % of all parameters.
PUBLISHED = {0.31: (0.4, 0.2), 0.46: (0.42, 0.5), 0.61: (0.1, 0.2)}


def cross_entropy(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """Return the mean over a sequence (1, T) of the next token's cross entropy."""
    return next_token_loss(model(input_ids=sequence, use_cache=False).logits[0], sequence[0])


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], ids[1:])


def self_distillation(teacher: PreTrainedModel, alpha: float, temperature: float) -> Loss:
    """Return SDMPrune's loss of a pruned model, with the dense one as the teacher."""

    def loss(model: PreTrainedModel, sequence: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(input_ids=sequence, use_cache=False).logits[0] / temperature
        logits = model(input_ids=sequence, use_cache=False).logits[0]
        log_p, log_q = target.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
        return (1 - alpha) * next_token_loss(logits, sequence[0]) + alpha * kl

    return loss


def published_settings(prune_ratio: float) -> tuple[float, float]:
    """Return SDMPrune's α and τ for the nearest part of the neurons that its authors removed."""
    return PUBLISHED[min(PUBLISHED, key=lambda published: abs(published - prune_ratio))]


class Importance(NamedTuple):
    """The importance of each neuron by both methods, (L, F) float64."""

    of_sums: Tensor  # LLM-Pruner's Σ_w |w · mean_n g_n|
    of_each: Tensor  # SDMPrune's Σ_w Σ_n |w · g_n|


def importance(model: PreTrainedModel, ids: Tensor, loss: Loss = cross_entropy) -> Importance:
    """Return both methods' importance over sequences ids (N, T), by a backward pass of each."""
    mlps = gated_mlps(model)
    sums: Gradients = {}
    of_each = torch.zeros(len(mlps), mlps[0].width, dtype=torch.float64)
    for gradients in each_gradient(model, ids, loss):
        terms = {linear: linear.weight.detach() * g for linear, g in gradients.items()}
        of_each += torch.stack([summed_by_neuron(mlp, terms) for mlp in mlps])
        for linear, term in terms.items():
            sums[linear] = sums[linear].add_(term) if linear in sums else term
    of_sums = torch.stack([summed_by_neuron(mlp, sums) for mlp in mlps]) / len(ids)
    return Importance(of_sums, of_each)


def summed_by_neuron(mlp: GatedMLP, terms: Gradients) -> Tensor:
    """Return the sum of absolute terms over each neuron's weights, (F,) float64."""
    total = torch.zeros(mlp.width, dtype=torch.float64)
    for linear, axis, times in mlp.linears:
        sums = terms[linear].abs().sum(dim=1 - axis, dtype=torch.float64)
        total += sums.view(times, mlp.width).sum(dim=0)
    return total


def each_gradient(model: PreTrainedModel, ids: Tensor, loss: Loss) -> Iterator[Gradients]:
    """Yield each sequence's gradient in the MLPs' weights; the model is left as it was."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    linears = [linear for mlp in gated_mlps(model) for linear, _, _ in mlp.linears]
    weights = [linear.weight.requires_grad_(True) for linear in linears]
    try:
        for sequence in ids.split(1):
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(model, sequence), weights)
            yield dict(zip(linears, gradients, strict=True))
    finally:
        for parameter, was in required:
            parameter.requires_grad_(was)
