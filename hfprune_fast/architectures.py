"""Where each model family keeps its layers, gated MLP and head.

To add a family: one line in FAMILIES (its `model_type` and what differs from LLaMA's names), and
what CONTRIBUTING.md has besides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.errors import ArgumentError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Names of the parts, as paths below the base model (`decoder`) or below one layer."""

    decoder: str = "model"
    layers: str = "layers"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    qk_norm: bool = False  # q and k are normalised, which takes memory


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm=True),
}
NON_UNIFORM = "hfprune_"  # begins the model_type of a family whose layers have their own widths


@dataclass(frozen=True)
class GatedMLP:
    """The three linear layers of one gated MLP, down(act_fn(gate(x)) * up(x)), and their module."""

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear


@dataclass(frozen=True)
class ModelParts:
    """The parts of a loaded model that scoring, pruning and evaluation touch."""

    family: Family
    decoder: nn.Module
    embedding: nn.Module
    layers: tuple[nn.Module, ...]
    mlps: tuple[GatedMLP, ...]
    norm: nn.Module
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

    mlp_widths: tuple[int, ...] | None = None  # if not all are intermediate_size, the widest

    def __post_init__(self) -> None:
        uniform = self.mlp_widths is None or set(self.mlp_widths) == {self.intermediate_size}
        widths = None if uniform else tuple(self.mlp_widths or ())
        object.__setattr__(self, "mlp_widths", widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each layer's MLP."""
        return self.mlp_widths or (self.intermediate_size,) * self.num_layers

    def params_at(self, widths: int | Sequence[int]) -> int:
        """Parameters of the whole model when its MLPs have so many neurons, all or each."""
        return self.total_params - self._removed(widths) * self.params_per_neuron

    def linear_params_at(self, widths: int | Sequence[int]) -> int:
        """Weights of linear layers, each 2 FLOPs a token, when the MLPs have so many neurons."""
        return self.linear_params - self._removed(widths) * 3 * self.hidden_size

    def pruned_to(self, widths: int | Sequence[int]) -> dict[str, Any]:
        """Widths, parameters and ratios of pruning the MLPs to so many neurons, all or each.

        `mlp_widths` and `dense_mlp_widths` are there when they differ from layer to layer.
        """
        params = self.params_at(widths)
        each = [widths] if isinstance(widths, int) else list(widths)
        achieved: dict[str, Any] = {
            "intermediate_size": max(each),
            "dense_intermediate_size": self.intermediate_size,
            "prune_ratio": 1 - (sum(self.widths) - self._removed(widths)) / sum(self.widths),
            "params": params,
            "dense_params": self.total_params,
            "param_ratio": 1 - params / self.total_params,
        }
        if len(set(each)) > 1:
            achieved["mlp_widths"] = each
        if self.mlp_widths is not None:
            achieved["dense_mlp_widths"] = list(self.mlp_widths)
        return achieved

    def _removed(self, widths: int | Sequence[int]) -> int:
        left = self.num_layers * widths if isinstance(widths, int) else sum(widths)
        return sum(self.widths) - left


def widths_text(widths: Sequence[int]) -> str:
    """Say how wide MLPs are: 61, or 40 to 61 (mean 50.3)."""
    if len(set(widths)) == 1:
        return str(widths[0])
    return f"{min(widths)} to {max(widths)} (mean {sum(widths) / len(widths):.1f})"


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
        f"{name} is not supported: no gated MLP is known for model_type {model_type!r}; "
        f"supported are {', '.join(FAMILIES)}"
    )


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


def size_of(model: PreTrainedModel) -> ModelSize:
    """Count the parameters of a model, which may be on the meta device."""
    mlps = parts_of(model).mlps
    hidden = mlps[0].gate.weight.shape[1]
    widths = tuple(len(mlp.gate.weight) for mlp in mlps)
    biases = sum(linear.bias is not None for linear in (mlps[0].gate, mlps[0].up))
    return ModelSize(
        model_type=str(family_type(model.config.to_dict())),
        num_layers=len(mlps),
        hidden_size=hidden,
        intermediate_size=max(widths),
        total_params=sum(p.numel() for p in model.parameters()),
        linear_params=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        params_per_neuron=3 * hidden + biases,
        mlp_widths=widths,
    )


def check_keep(keep: Mapping[int, Tensor], dense: Sequence[int]) -> dict[int, Tensor]:
    """Return keep as int64 tensors that fit layers of so many neurons."""
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
