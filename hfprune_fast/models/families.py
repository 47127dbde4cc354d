"""Where each model family keeps its layers, gated MLP and head.

To add a family: one line in FAMILIES (its `model_type` and what differs from LLaMA's names);
docs/families.md lists the other steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_fast.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Names of the parts, as paths below the base model (`decoder`) or below one layer."""

    class_name: str  # begins the names of transformers' classes: Llama, as in LlamaForCausalLM
    decoder: str = "model"
    layers: str = "layers"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    attention_out: str = "self_attn.o_proj"
    qk_norm: bool = False  # q and k are normalised, which takes memory


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", qk_norm=True),
}

NON_UNIFORM = "hfprune_"  # begins the model_type of a family whose layers have their own widths


def family_type(config: Mapping[str, Any]) -> Any:
    """Return the model_type of a parsed config.json's family."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type.removeprefix(NON_UNIFORM) in FAMILIES:
        return model_type.removeprefix(NON_UNIFORM)
    return model_type


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed config.json, or raise UnsupportedModelError."""
    model_type, classes = family_type(config), config.get("architectures")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    name = classes[0] if isinstance(classes, list) and classes else "this model"
    raise UnsupportedModelError(
        f"{name!s:.100} is not supported: no gated MLP is known for model_type {model_type!r:.60}; "
        f"supported are {', '.join(FAMILIES)}"
    )


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
