"""The parts of a loaded model that scoring and pruning touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.errors import ArgumentError, UnsupportedModelError
from hfprune_fast.models.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GatedMLP:
    """The three linear layers of one gated MLP, down(act_fn(gate(x)) * up(x)), and their module."""

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


@dataclass(frozen=True)
class ModelParts:
    """The parts of one model, found by the names in `families`."""

    family: Family
    decoder: nn.Module
    embedding: nn.Module
    layers: tuple[nn.Module, ...]
    mlps: tuple[GatedMLP, ...]
    norm: nn.Module
    head: nn.Linear


def parts_of(model: PreTrainedModel) -> ModelParts:
    """Find the decoder, the gated MLPs and the head of a loaded causal language model."""
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise UnsupportedModelError(
            f"expected a causal language model of transformers, got {type(model).__name__}"
        )
    family = family_of(model.config.to_dict())
    try:
        decoder = model.get_submodule(family.decoder)
        head = model.get_submodule(family.head)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {family.decoder}/{family.head}; "
            "load it with AutoModelForCausalLM"
        ) from None
    layers: Any = decoder.get_submodule(family.layers)
    mlp, _, _ = family.down.rpartition(".")
    paths = (mlp, family.gate, family.up, family.down)
    return ModelParts(
        family,
        decoder,
        embedding=decoder.get_submodule(family.embedding),
        layers=tuple(layers),
        mlps=tuple(GatedMLP(*map(layer.get_submodule, paths)) for layer in layers),
        norm=decoder.get_submodule(family.norm),
        head=head,  # type: ignore[arg-type]
    )


def check_keep(keep: Mapping[int, Tensor], dense: Sequence[int]) -> dict[int, Tensor]:
    """Return keep as int64 tensors, or raise ArgumentError; `dense` is each layer's width."""
    if not isinstance(keep, Mapping) or sorted(keep) != list(range(len(dense))):
        got = sorted(keep) if isinstance(keep, Mapping) else f"a {type(keep).__name__}"
        raise ArgumentError(
            f"keep must have an entry for each layer 0..{len(dense) - 1}, got {got}"
        )
    tensors = {layer: torch.as_tensor(indices) for layer, indices in keep.items()}
    for layer, indices in tensors.items():
        ok = (
            indices.dim() == 1
            and len(indices) > 0
            and indices.dtype == torch.int64
            and bool((indices.diff() > 0).all())
            and int(indices[0]) >= 0
            and int(indices[-1]) < dense[layer]
        )
        if not ok:
            raise ArgumentError(
                f"keep[{layer}] must be sorted, distinct int64 indices in 0..{dense[layer] - 1}, "
                "one or more"
            )
    return tensors
