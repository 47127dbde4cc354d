"""The arithmetic of the HFPrune paper's script, as a baseline: what it computes and what it wastes.

In our own words: no code is taken from visresearch/HFPrune. For each sequence, alone in its batch,
the loss is the mean over its positions of H = -Σ p log p, and then

    score[l] += Σ_t |a_t · g_t|      a the input of layer l's down_proj, g = dloss/da

with the product, the sum and the total all rounded to the model's dtype. Kept as it is there:

- the MLPs' weights require a gradient, so theirs are computed and kept, and nobody reads them;
- the logits are upcast to fp32 twice where they are not fp32, and softmax, log_softmax and their
  product are each made whole, (T, V) fp32; autograd makes as many again;
- logits, probabilities, their logarithms and a KV cache that nobody asked for are held, by their
  names, through the backward pass and until the next sequence's take their place.

The whole job loads the model twice, to score it and to prune it. Not taken over: the script makes
the number of neurons from `hidden_size`, here it is of the ratio asked for, and unpickles scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

Tensors = dict[int, Tensor]


def score(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Score every MLP neuron over sequences ids (N, T); return (L, F) in the model's dtype.

    The model is left in evaluation mode and frozen, without gradients and hooks.
    """
    mlps: list[Any] = [layer.mlp for layer in model.get_decoder().layers]
    totals = [torch.zeros_like(mlp.down_proj.weight[0]) for mlp in mlps]
    acts: Tensors = {}
    grads: Tensors = {}
    model.eval().requires_grad_(False)
    for mlp in mlps:
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear.weight.requires_grad_(True)
    with torch.enable_grad(), _hooked(mlps, acts, grads):
        for sequence in ids:
            model.zero_grad()
            output = model(input_ids=sequence[None])
            p, log_p = probabilities(output.logits)
            (p * log_p).sum(dim=-1).neg().mean().backward()
            for layer, total in enumerate(totals):
                total += (acts[layer] * grads[layer]).abs().sum(dim=(0, 1))
            acts.clear()
            grads.clear()
    model.zero_grad()
    model.requires_grad_(False)
    return torch.stack(totals)


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p and log p in fp32, each from an upcast of its own."""
    return torch.softmax(logits.float(), dim=-1), torch.log_softmax(logits.float(), dim=-1)


def entropy_of(logits: Tensor) -> Tensor:
    """H of each row, for those who time it alone."""
    p, log_p = probabilities(logits)
    return (p * log_p).sum(dim=-1).neg()


@contextmanager
def _hooked(mlps: list[Any], acts: Tensors, grads: Tensors) -> Iterator[None]:
    """Keep every down_proj's input of the forward pass, and the gradient there of the backward."""

    def keep(into: Tensors, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor], outputs: object) -> None:
            into[layer] = inputs[0].detach()

        return hook

    handles = []
    for layer, mlp in enumerate(mlps):
        handles.append(mlp.down_proj.register_forward_hook(keep(acts, layer)))
        handles.append(mlp.down_proj.register_full_backward_hook(keep(grads, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prune(
    folder: Path, ids: Tensor, out: Path, prune_ratio: float, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Write the pruned checkpoint to out; return the scores and (L, K) the neurons kept.

    dtype: to score in; what is written is bfloat16.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    scores = score(model, ids)
    del model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    width = round((1 - prune_ratio) * scores.shape[1])
    keep = torch.topk(scores, width, dim=1).indices.sort(dim=1).values
    for layer, kept in zip(model.get_decoder().layers, keep, strict=True):
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(layer.mlp, name).weight.index_select(axis, kept)
            linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
            linear.weight.data.copy_(weight)
            setattr(layer.mlp, name, linear)
    model.config.intermediate_size = width
    model.save_pretrained(out)
    return scores, keep
