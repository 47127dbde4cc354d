"""Where each model family keeps its layers, gated MLP and head.

To add a family: one line in FAMILIES (its `model_type` and what differs from LLaMA's names), and
its name in the README and in the tests' list of families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfprune_fast.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Names of the parts, as paths below the base model (`decoder`) or below one layer."""

    decoder: str = "model"
    layers: str = "layers"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    head: str = "lm_head"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


@dataclass(frozen=True)
class GatedMLP:
    """The three linear layers of one gated MLP: down(act_fn(gate(x)) * up(x))."""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


@dataclass(frozen=True)
class ModelParts:
    """The parts of a loaded model that scoring, pruning and evaluation touch."""

    decoder: nn.Module
    mlps: tuple[GatedMLP, ...]
    head: nn.Linear


@dataclass(frozen=True)
class ModelSize:
    """What a budget needs to know of the dense model."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    total_params: int  # tied ones once
    linear_params: int  # weights of linear layers, the head among them
    params_per_neuron: int  # biases included

    def params_at(self, width: int) -> int:
        """Parameters of the whole model when every MLP has `width` neurons."""
        return self.total_params - self._removed(width) * self.params_per_neuron

    def linear_params_at(self, width: int) -> int:
        """Weights of linear layers, each 2 FLOPs a token, when every MLP has `width` neurons."""
        return self.linear_params - self._removed(width) * 3 * self.hidden_size

    def _removed(self, width: int) -> int:
        return self.num_layers * (self.intermediate_size - width)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed config.json, or raise UnsupportedModelError."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        name = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
        raise UnsupportedModelError(
            f"{name} is not supported: no gated MLP is known for model_type "
            f"{config.get('model_type')!r}; supported are {', '.join(FAMILIES)}"
        )
    return family


def parts_of(model: PreTrainedModel) -> ModelParts:
    """Find the decoder, the gated MLPs and the head of a loaded causal language model."""
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
    mlps = tuple(
        GatedMLP(*(layer.get_submodule(path) for path in (family.gate, family.up, family.down)))
        for layer in layers
    )
    return ModelParts(decoder, mlps, head)  # type: ignore[arg-type]


def neuron_axis(family: Family, tensor_name: str) -> tuple[int, int] | None:
    """Return (layer, axis of its neurons) of a checkpoint tensor, None if it holds no neurons.

    Names with and without the base model's prefix are understood; down_proj's bias is not cut.
    """
    prefix = rf"(?:{re.escape(family.decoder)}\.)?{re.escape(family.layers)}\.(\d+)\."
    rows = f"(?:{re.escape(family.gate)}|{re.escape(family.up)})"
    columns = re.escape(family.down)
    match = re.fullmatch(rf"{prefix}(?:({rows})\.(?:weight|bias)|({columns})\.weight)", tensor_name)
    if match is None:
        return None
    return int(match[1]), 0 if match[2] else 1
