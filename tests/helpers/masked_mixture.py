"""What a model with experts computes without what is dropped, in float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hfprune_fast.models.sites import SiteKey


def masked_logits(folder: Path, keep: Mapping[SiteKey, Tensor], ids: Tensor) -> Tensor:
    """Return what the dense model computes in float64 without what is dropped.

    The neurons of an expert are dropped by zeros in down_proj; an expert by a router that gives it
    no entry.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    layers: Any = model.model.layers
    for number, layer in enumerate(layers):
        mlp: Any = getattr(layer, "mlp", None) or layer.block_sparse_moe
        experts: Any = getattr(mlp, "experts", None)
        own = mlp if experts is None else getattr(mlp, "shared_experts", None)
        with torch.no_grad():
            if own is not None:
                mask(own.down_proj.weight, keep[number])
            if experts is None:
                continue
            kept = [e for e in range(len(experts.down_proj)) if (number, e) in keep]
            for e in kept:
                weight = experts.down_proj[e]
                mask(weight.t() if experts.is_transposed else weight, keep[number, e])
        for module in (experts, getattr(mlp, "gate", None) or mlp.router):
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(parameter[kept]))
            for name, buffer in list(module.named_buffers()):
                setattr(module, name, buffer[kept])
        for module in mlp.modules():
            if isinstance(getattr(module, "num_experts", None), int):
                module.num_experts = len(kept)
    logits: Tensor = model(ids).logits
    return logits.detach()


def mask(down: Tensor, kept: Tensor) -> None:
    gone = torch.ones(down.shape[1], dtype=torch.bool)
    gone[kept] = False
    down[:, gone] = 0
