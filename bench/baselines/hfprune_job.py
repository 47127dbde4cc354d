"""The whole job as the HFPrune paper's script goes about it, as a baseline, in our own words.

The model is loaded, scored (`hfprune_reference.py`) and forgotten, its scores saved; the model is
loaded once more, each layer's neurons of the largest scores are kept by slices of rows and columns
in new linear layers, and the whole is saved. Not taken over: its number of neurons is made from
`hidden_size`, here from the ratio asked for, and it unpickles the scores.
"""

from __future__ import annotations

from pathlib import Path

import hfprune_reference
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def prune(folder: Path, ids: Tensor, out: Path, prune_ratio: float) -> Tensor:
    """Write the pruned checkpoint to out, the scores beside it; return (L, K) the neurons kept."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    scores = hfprune_reference.score(model, ids)
    del model
    save_file({"scores": scores}, f"{out}.scores.safetensors")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    width = round((1 - prune_ratio) * scores.shape[1])
    keep = torch.topk(scores, width, dim=1).indices.sort(dim=1).values
    for layer, kept in zip(model.get_decoder().layers, keep, strict=True):
        mlp = layer.mlp
        mlp.gate_proj = _sliced(mlp.gate_proj, kept, 0)
        mlp.up_proj = _sliced(mlp.up_proj, kept, 0)
        mlp.down_proj = _sliced(mlp.down_proj, kept, 1)
    model.config.intermediate_size = width
    model.save_pretrained(out)
    return keep


def _sliced(linear: nn.Module, kept: Tensor, axis: int) -> nn.Linear:
    weight = linear.weight.index_select(axis, kept)
    new = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    new.weight.data.copy_(weight)
    return new
