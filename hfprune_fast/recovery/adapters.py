"""What of a student is trained: LoRA adapters, which peft makes, or the weights themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import RecoveryOptions
from hfprune_fast.errors import ArgumentError, UnsupportedModelError, one_line, one_line_errors
from hfprune_fast.models.sites import GatedMLP, ModelParts

ADAPTER = "default"  # peft's name of the one that it makes
_ALPHA_A_RANK = 2  # lora_alpha; the default learning rates were chosen with it
_OF_EXPERTS = ("gate_up_proj", "down_proj")

# Of a parameter, by its name in the model: what is added to it (True), or what it becomes.
Changes = dict[str, tuple[bool, Callable[[], Tensor]]]


class Trained(Mapping[str, Tensor]):
    """What a checkpoint's tensors become: {stored name: tensor, in its stored dtype}.

    Each is made when it is read, so that one of them is in memory at a time.
    """

    def __init__(self, source: ModelSource, changes: Changes) -> None:
        self._source, self._changes = source, changes
        self._places = {
            stored: (ours, number)
            for ours in changes
            for number, stored in enumerate(source.names[ours])
        }

    @torch.no_grad()
    def __getitem__(self, stored: str) -> Tensor:
        ours, number = self._places[stored]
        count = len(self._source.names[ours])
        is_added, change = self._changes[ours]
        shape = self._source.tensors[stored].shape
        made = change().detach().cpu()
        if stored in self._source.across:
            made = made.mT
        part = made.reshape(count, *shape)[number]
        if is_added:
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            part = part + self._source.read(stored).to(part.dtype)
        return part.to(self._source.dtype_of(stored))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def check_packages() -> None:
    """Refuse in one line where what trains is not installed."""
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            f"recover needs peft and accelerate ({one_line(error)}): "
            "pip install 'hfprune_fast[recover]'"
        ) from None


def unfreeze(model: nn.Module, parts: ModelParts, options: RecoveryOptions) -> Changes:
    """Let the weights themselves be trained: all of the model, or those of its MLPs."""
    modules: list[nn.Module] = [model]
    if options.train == "mlp":
        modules = [linear for mlp in parts.own_mlps.values() for linear, _, _ in mlp.linears]
        modules += [experts.module for experts in parts.with_experts.values()]
    for module in modules:
        module.requires_grad_(True)
    named = model.named_parameters(remove_duplicate=False)
    return {
        name: (False, lambda parameter=parameter: parameter)  # type: ignore[misc]
        for name, parameter in named
        if parameter.requires_grad
    }


def add_lora(
    model: Any, parts: ModelParts, options: RecoveryOptions, seed: int
) -> tuple[Any, Changes]:
    """Put LoRA adapters into a model; return peft's model, and what they add to each weight.

    Neurons that are all zeros, of padded layers, stay so: they have no gradient, and down_proj's
    adapter begins at zero for them.

    Raises:
        UnsupportedModelError: peft cannot adapt the layers.
    """
    from peft import LoraConfig, get_peft_model

    dead = {mlp.down: _dead(mlp) for mlp in parts.own_mlps.values()}
    of_mlps, others = linears(model, parts)
    modules, parameters = [*of_mlps, *others], list[str]()
    if options.train == "mlp":
        modules = of_mlps
    if parts.with_experts:
        # peft takes the names of linear layers of MLPs for those of experts in earlier releases.
        parameters = [*_experts(model, parts), *(f"{path}.weight" for path in of_mlps)]
        modules = [path for path in modules if path not in of_mlps]
    config = LoraConfig(
        r=options.lora,
        lora_alpha=_ALPHA_A_RANK * options.lora,
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    with (
        torch.random.fork_rng(),
        one_line_errors("peft", UnsupportedModelError),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of what peft calls in transformers
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    changes: Changes = {}
    inside: Any = adapted.base_model.model
    for path, module in inside.named_modules():
        if not hasattr(module, "get_delta_weight") or ADAPTER not in module.lora_A:
            continue
        name = ".".join(part for part in path.split(".") if part != "base_layer")
        leaf = getattr(module, "parameter_name", "weight")
        changes[f"{name}.{leaf}"] = True, partial(module.get_delta_weight, ADAPTER)
        zero = dead.get(module.get_base_layer())
        if zero is not None:
            with torch.no_grad():
                module.lora_A[ADAPTER].weight[:, zero] = 0
    return adapted, changes


def reset_lora(adapted: Any) -> None:
    """Let adapters add nothing again."""
    with torch.no_grad():
        for module in adapted.modules():
            if hasattr(module, "lora_B") and ADAPTER in module.lora_B:
                module.lora_B[ADAPTER].weight.zero_()


def _dead(mlp: GatedMLP) -> Tensor:
    """Return which neurons, (F,) bool, have no weight that is not zero."""
    gate, up = mlp.gate_and_up_weights
    return ~(gate.any(dim=1) | up.any(dim=1) | mlp.down.weight.detach().any(dim=0))


def linears(model: nn.Module, parts: ModelParts) -> tuple[list[str], list[str]]:
    """Return the paths of linear layers that get adapters: of MLPs, and the layers' others."""
    mlps = {id(linear) for mlp in parts.own_mlps.values() for linear, _, _ in mlp.linears}
    within = {id(module) for layer in parts.layers for module in layer.modules()}
    recurrent = {path for path, module in model.named_modules() if "conv1d" in module._modules}
    of_mlps, others = list[str](), list[str]()
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or id(module) not in within:
            continue
        parent, _, leaf = path.rpartition(".")
        if id(module) in mlps:
            of_mlps.append(path)
        elif not (parent in recurrent and leaf == "out_proj"):  # fused kernels read that themselves
            others.append(path)
    return of_mlps, others


def _experts(model: nn.Module, parts: ModelParts) -> list[str]:
    """Return the paths of the parameters of experts."""
    modules = {id(module): path for path, module in model.named_modules()}
    return [
        f"{modules[id(experts.module)]}.{leaf}"
        for experts in parts.with_experts.values()
        for leaf in _OF_EXPERTS
    ]
