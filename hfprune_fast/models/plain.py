"""Which loaded models are taken: those whose linear layers are torch's own, with plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hfprune_fast.console import say
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.sites import ModelParts, parts_of

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


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    linears = [linear for mlp in parts.own_mlps.values() for linear, _, _ in mlp.linears]
    for linear in [parts.head] if use == "evaluate" else [parts.head, *linears]:
        problem = _problem(linear)
        if problem is not None:
            raise ArgumentError(f"{modules[id(linear)]} {problem}")
    if use == "evaluate":
        return cast("PreTrainedModel", model)
    experts = [each.module for each in parts.with_experts.values()]
    for module in experts:
        if is_patched(module):
            raise ArgumentError(
                f"{modules[id(module)]} is patched or has hooks, expected it as it is; take off "
                "what wraps or patches it"
            )
    _check_sizes(parts, modules)
    of_experts = [p for module in experts for p in module.parameters()]
    dtypes = {p.dtype for p in (*(each.weight for each in (parts.head, *linears)), *of_experts)}
    if len(dtypes) > 1 and use != "prune":
        got = ", ".join(sorted(map(str, dtypes)))
        raise ArgumentError(
            f"the MLPs and the head must be of one dtype, got {got}; cast the model"
        )
    for parameter in (*(p for linear in linears for p in linear.parameters()), *of_experts):
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


def is_patched(module: nn.Module) -> bool:
    """Return whether hooks, or a forward set on it, make a module do more than its class does."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


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
    for mlp in parts.own_mlps.values():
        for linear, axis, times in mlp.linears:
            shape = (hidden, mlp.width) if axis else (times * mlp.width, hidden)
            bias = linear.bias is None or linear.bias.shape == shape[:1]
            if mlp.width < 1 or tuple(linear.weight.shape) != shape or not bias:
                raise ArgumentError(
                    f"{modules[id(linear)]} has a weight {tuple(linear.weight.shape)}, expected "
                    f"{shape}; a sharded model must be gathered first"
                )
