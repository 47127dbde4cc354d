"""The parts of a loaded model that scoring and pruning touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hfprune_fast.console import say
from hfprune_fast.errors import ArgumentError, UnsupportedModelError, one_line
from hfprune_fast.models.families import Family, family_of, family_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What a linear layer holds besides weight and bias, what that is, and how to be rid of it.
_NOT_PLAIN = {
    "base_layer": "carries an adapter; merge it first: model = model.merge_and_unload()",
    "parametrizations": "is parametrised; call torch.nn.utils.parametrize.remove_parametrizations",
    "weight_mask": "has a pruning mask; make it permanent with torch.nn.utils.prune.remove",
    "weight_g": "has a weight_norm; call torch.nn.utils.remove_weight_norm",
    "weight_orig": "computes its weight anew in each forward; remove that first",
}


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


def plain_model(model: Any, use: str) -> PreTrainedModel:
    """Return the causal language model, out of a wrapper of adapters, if its weights are plain.

    Plain are the linear layers that are read, cut or replaced: torch's own, whose output depends on
    a floating-point weight and bias that no other layer shares. Nothing is changed.

    Args:
        use: "score", "refit", "prune", or "evaluate", which reads the head alone and runs the rest
            as it is. Adapters elsewhere, such as on attention, are part of what is run; a model
            that has any is not pruned, as they would be saved beside what they no longer fit.

    Raises:
        ArgumentError, UnsupportedModelError: the first layer that is not plain, and what to do.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"{use} expected a loaded causal language model, got a {type(model).__name__}"
        )
    model = _inside_wrapper(model)
    parts = parts_of(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        if use != "evaluate":
            _check_parameter(name, parameter, use)
    modules = {id(module): name for name, module in model.named_modules()}
    linears = [linear for mlp in parts.mlps for linear, _, _ in mlp.linears]
    for linear in [parts.head] if use == "evaluate" else [parts.head, *linears]:
        problem = _problem(linear)
        if problem is not None:
            raise ArgumentError(f"{modules[id(linear)]} {problem}")
    if use == "evaluate":
        return cast("PreTrainedModel", model)
    _check_sizes(parts, modules)
    dtypes = {linear.weight.dtype for linear in (parts.head, *linears)}
    if len(dtypes) > 1 and use != "prune":
        got = ", ".join(sorted(map(str, dtypes)))
        raise ArgumentError(
            f"the MLPs and the head must be of one dtype, got {got}; cast the model"
        )
    for parameter in (p for linear in linears for p in linear.parameters()):
        first, *others = names[id(parameter)]
        if others:
            raise ArgumentError(
                f"{first} and {others[0]} are one parameter; give each its own, such as by "
                "copy.deepcopy of the layer"
            )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ArgumentError("the model is quantised; load it in bfloat16 instead")
    adapted = [modules[id(module)] for module in adapters_in(model)]
    if adapted and use == "prune":
        raise ArgumentError(f"{adapted[0]} {_NOT_PLAIN['base_layer']}")
    if adapted:
        say(
            f"the adapters on {adapted[0]} and the like are part of the model that is run; merge "
            "them (merge_and_unload) before it is pruned"
        )
    return cast("PreTrainedModel", model)


def adapters_in(model: nn.Module) -> list[nn.Module]:
    """Return the modules that wrap a layer of the model, its base_layer, with an adapter."""
    return [module for module in model.modules() if "base_layer" in module._modules]


def _inside_wrapper(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile, a PeftModel or the like wraps, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    unwrap = getattr(model, "get_base_model", None)
    if not callable(unwrap):
        return model
    inside: nn.Module = unwrap()
    own = {id(parameter) for parameter in inside.parameters()}
    if any(id(parameter) not in own for parameter in model.parameters()):
        raise ArgumentError(
            f"{type(model).__name__} adds a prompt, or other parameters, outside the model that it "
            "wraps, so that model would not be run as it is used"
        )
    return inside


def _check_parameter(name: str, parameter: Tensor, use: str) -> None:
    if parameter.is_meta:
        raise ArgumentError(
            f"{name} is on the meta device (offloaded?); load the model whole, or give its path"
        )
    plain = type(parameter) is Parameter and parameter.layout == torch.strided
    if not plain or parameter.dtype not in _DTYPES:
        raise ArgumentError(
            f"{name} is a {type(parameter).__name__}, {parameter.layout} {parameter.dtype}, "
            "expected a plain floating-point one; load the model unquantised, in bfloat16, and not "
            "sharded"
        )
    if use == "score" and parameter.is_inference():
        raise ArgumentError(
            f"{name} was made in torch.inference_mode, so nothing can be differentiated through "
            "it; load or copy the model outside, or give its path"
        )


def _problem(linear: nn.Module) -> str | None:
    """Return why a linear layer is not plain and what to do, None if it is plain."""
    held = {*linear._parameters, *linear._buffers, *linear._modules}
    for member, problem in _NOT_PLAIN.items():
        if member in held:
            return problem
    weight = linear._parameters.get("weight")
    plain = type(linear) is nn.Linear and "forward" not in vars(linear)
    if not plain or held != {"weight", "bias"} or type(weight) is not Parameter:
        extra = sorted(held - {"weight", "bias"})
        got = f" with {extra[0]}" if extra else "" if weight is not None else " without a parameter"
        return (
            f"is a {type(linear).__name__}{got}, expected torch.nn.Linear as it is; load the model "
            "unquantised, in bfloat16, and take off what wraps or patches it"
        )
    return None


def _check_sizes(parts: ModelParts, modules: Mapping[int, str]) -> None:
    """Refuse layers whose weights have not the shapes of a gated MLP: sharded ones have not."""
    hidden = parts.head.weight.shape[-1]
    for mlp in parts.mlps:
        for linear, axis, times in mlp.linears:
            shape = (hidden, mlp.width) if axis else (times * mlp.width, hidden)
            bias = linear.bias is None or linear.bias.shape == shape[:1]
            if mlp.width < 1 or tuple(linear.weight.shape) != shape or not bias:
                raise ArgumentError(
                    f"{modules[id(linear)]} has a weight {tuple(linear.weight.shape)}, expected "
                    f"{shape}; a sharded model must be gathered first"
                )


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
