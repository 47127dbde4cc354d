"""The parts of a loaded model that scoring and pruning touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.errors import ArgumentError, UnsupportedModelError, one_line
from hfprune_fast.models.declared import family_of, family_type
from hfprune_fast.models.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GatedMLP:
    """The linear layers of one gated MLP, down(act_fn(gate(x)) * up(x)), and their module.

    Where `gate` and `up` are one layer, its rows are gate's and then up's.
    """

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def fused(self) -> bool:
        return self.gate is self.up

    @property
    def width(self) -> int:
        """The number of neurons."""
        return self.down.weight.shape[1]

    @property
    def gate_and_up_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of gate and up, (F, D) each, without copying them."""
        if self.fused:
            gate, up = self.gate.weight.detach().chunk(2)
            return gate, up
        return self.gate.weight, self.up.weight

    @property
    def linears(self) -> list[tuple[nn.Linear, int, int]]:
        """Each layer with the axis of its neurons, and how often each neuron is in it."""
        rows = [(self.gate, 0, 2)] if self.fused else [(self.gate, 0, 1), (self.up, 0, 1)]
        return [*rows, (self.down, 1, 1)]


@dataclass(frozen=True)
class Logits:
    """What a model makes of its head's output z: softcap · tanh(scale · z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the kernels."""
        return {"logit_scale": self.scale, "softcap": self.softcap}

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap


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
    logits: Logits

    def output_scale(self, layer: int) -> float:
        """What an MLP's output is multiplied by when it is added to the residual stream."""
        path = self.family.output_scale
        return float(attrgetter(path)(self.layers[layer])) if path else 1.0


def parts_of(model: PreTrainedModel) -> ModelParts:
    """Find the decoder, the gated MLPs and the head of a loaded causal language model."""
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise UnsupportedModelError(
            f"expected a causal language model of transformers, got {type(model).__name__}"
        )
    config: Any = model.config
    family = family_of({**config.to_dict(), "architectures": [type(model).__name__]})
    text = config if family.tower is None else config.text_config
    site = family.site
    mlp, _, _ = site.down.rpartition(".")
    paths = (mlp, site.gate, site.up, site.down)
    try:
        decoder = model.get_submodule(family.decoder)
        layers: Any = decoder.get_submodule(family.layers)
        return ModelParts(
            family,
            decoder,
            embedding=decoder.get_submodule(family.embedding),
            layers=tuple(layers),
            mlps=tuple(GatedMLP(*map(layer.get_submodule, paths)) for layer in layers),
            norm=decoder.get_submodule(family.norm),
            head=model.get_submodule(family.head),  # type: ignore[arg-type]
            logits=_logits(family, text),
        )
    except (AttributeError, TypeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has not the parts of a {family_type(config.to_dict())} with a "
            f"head, such as {family.head} ({one_line(error)}); load it with AutoModelForCausalLM"
        ) from None


def _logits(family: Family, config: Any) -> Logits:
    scale = 1.0
    if family.logit_scale:
        scale = float(getattr(config, family.logit_scale))
    if family.logit_divisor:
        scale = 1 / float(getattr(config, family.logit_divisor))
    cap = getattr(config, family.softcap, None) if family.softcap else None
    return Logits(scale, None if cap is None else float(cap))


def rows_of(kept: Tensor, width: int, times: int) -> Tensor:
    """Return where kept neurons are in an axis of `times` blocks of `width` neurons each."""
    return torch.cat([kept + width * i for i in range(times)])


def check_keep(keep: Mapping[int, Tensor], dense: Sequence[int]) -> dict[int, Tensor]:
    """Return keep as int64 tensors, or raise ArgumentError; `dense` is each layer's width."""
    if not isinstance(keep, Mapping) or set(keep) != set(range(len(dense))):
        got = list(keep) if isinstance(keep, Mapping) else f"a {type(keep).__name__}"
        raise ArgumentError(
            f"keep must have an entry for each layer 0..{len(dense) - 1}, got {got}"
        )
    try:
        tensors = {layer: torch.as_tensor(keep[layer]).cpu() for layer in range(len(dense))}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"keep must hold tensors of int64 indices ({one_line(error)})"
        ) from None
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
