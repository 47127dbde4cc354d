"""Checkpoints as models of transformers: its classes, our tensors, the model whole or not at all.

No code that came with a model is run, and a model is only made when the checkpoint's tensors are
exactly those that its config calls for, by name: a checkpoint whose names transformers would
convert while loading is refused.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.checkpoint.config_json import dtype_of, read_config, widths_of
from hfprune_fast.checkpoint.folder import TORCH_DTYPES, check_tensors_are
from hfprune_fast.checkpoint.pretrained import load_config
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.errors import ArgumentError, CheckpointError, one_line, one_line_errors
from hfprune_fast.models.families import FAMILIES, family_type
from hfprune_fast.models.spec import ModelSpec, spec_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch also keeps such a context's device in a global: two at a time would leave it at meta.
_META_CONTEXT = threading.Lock()
_MAX_BUFFER_ENTRIES = 1 << 24


def spec_from_config(folder: Path) -> tuple[ModelSpec, Any]:
    """Return the spec and the transformers config of a folder, from its config.json alone.

    Models of one and two layers are made, whatever their number is.
    """
    path, declared = folder / "config.json", read_config(folder)
    widths, config = widths_of(path, declared), load_config(folder, declared)
    base = f"{FAMILIES[family_type(declared)].class_name}Model"
    if declared.get("architectures") == [base] and declared.get("tie_word_embeddings") is not True:
        raise CheckpointError(f"{path} is of a {base}, a model without a head; give one with it")
    config.dtype, widest = dtype_of(path, declared), max(widths)

    def first_layers(count: int) -> ModelSpec:
        of_family = {"model_type": family_type(declared), "intermediate_size": widest}
        cut = {**declared, **of_family, "num_hidden_layers": count}
        cut["layer_types"] = (declared.get("layer_types") or [])[:count] or None
        cut.pop("per_layer_config", None)
        return spec_of(skeleton(load_config(folder, cut)))

    with one_line_errors(f"{path} does not make a model"):
        one, two = first_layers(1), first_layers(2)
    narrower = sum(widest - width for width in widths)

    def of_all(one: int, two: int, params_per_neuron: int) -> int:
        return one + (len(widths) - 1) * (two - one) - narrower * params_per_neuron

    spec = replace(
        one,
        num_layers=len(widths),
        total_params=of_all(one.total_params, two.total_params, one.params_per_neuron),
        linear_params=of_all(one.linear_params, two.linear_params, 3 * one.hidden_size),
        mlp_widths=widths,
    )
    return spec, config


def skeleton(
    config: Any, dtype: torch.dtype = torch.float32, attention: str = "auto"
) -> PreTrainedModel:
    """Return the model without weights: parameters on meta, buffers (rotary tables) computed.

    Other threads may run models meanwhile, so nothing global changes: the meta device is a context
    of this thread, and transformers gets no dtype, which it would set for the whole process.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.dtype = None
    config._attn_implementation = None if attention == "auto" else attention
    with _META_CONTEXT, torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    config.dtype = dtype
    entries = sum(buffer.numel() for buffer in model.buffers())
    if entries > _MAX_BUFFER_ENTRIES:
        raise ValueError(f"its rotary tables would hold {entries} numbers")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            model._init_weights(module)  # as from_pretrained computes what no checkpoint has
    return model.eval()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Blueprint:
    """A model without weights, and the name of each weight in its checkpoint."""

    source: ModelSource
    model: PreTrainedModel
    names: dict[str, str]  # of the model's parameters -> of the checkpoint's tensors
    dtype: torch.dtype  # to run in
    device: torch.device


def blueprint(
    model_or_path: str | Path | ModelSource,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "auto",
) -> Blueprint:
    """Prepare a checkpoint to run.

    Args:
        model_or_path: a model folder, hub name or `demo`, or an open one.
        dtype: "auto" (that of most of the checkpoint's parameters, but float32 on a CPU that is
            slow in it) or "float32", "bfloat16", "float16", "float64".
        device: "auto" (cuda where there is one) or any torch device.
        attention: "auto" (sdpa where the family has it), "sdpa", "eager" or "flash_attention_2".

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or not floating-point.
        ArgumentError: an unknown or absent device, or an attention that is not installed.
    """
    source = open_source(model_or_path)
    target, family = torch_device(device), source.family
    to_run_in = dtype_to_run_in(dtype, source.stored_dtype, target)
    check_attention(attention)
    config = source.transformers_config
    with one_line_errors(f"{source.folder}/config.json does not make a model"):
        model = skeleton(config, to_run_in, attention)
    decoder, head = f"{family.decoder}.", f"{family.head}.weight"
    state = model.state_dict()
    names = {name: name for name in state}
    if not source.has_prefix:
        names = {name: name.removeprefix(decoder) for name in state}
    expected = {theirs: tuple(state[ours].shape) for ours, theirs in names.items()}
    if model.config.tie_word_embeddings:
        names[head] = names[f"{decoder}{family.embedding}.weight"]
        if head not in source.tensors:
            del expected[head]
    check_tensors_are(source.folder, source.tensors, expected)
    return Blueprint(source, model, names, to_run_in, target)


def load_model(
    model: str | Path | ModelSource, *, dtype: str = "auto", device: str = "auto"
) -> PreTrainedModel:
    """Load a checkpoint for inference, or raise CheckpointError; never half of it.

    On a CPU, weights that are stored in the requested dtype stay in the file, mapped: they take
    memory that the system can reuse, and changes are never written back.

    Arguments and errors are those of `blueprint`.
    """
    return build(blueprint(model, dtype=dtype, device=device))


def build(plan: Blueprint) -> PreTrainedModel:
    """Return a blueprint's model with all of its weights in place."""
    mapped = {
        name: torch.UntypedStorage.from_file(str(shard.path), False, os.path.getsize(shard.path))
        for name, shard in plan.source.shards.items()
    }

    def load(name: str) -> Tensor:
        info = plan.source.tensors[name]
        stored = TORCH_DTYPES[info.dtype]
        place = plan.source.shards[info.file].tensors[name][2]
        size = math.prod(info.shape) * stored.itemsize
        storage: Any = mapped[info.file]
        tensor = torch.empty(0, dtype=torch.uint8).set_(storage, place, (size,), (1,))
        if place % stored.itemsize:
            tensor = tensor.clone()
        return tensor.view(stored).view(info.shape).to(plan.device, plan.dtype)

    loaded = {theirs: frozen(load(theirs)) for theirs in set(plan.names.values())}
    for ours, theirs in plan.names.items():
        put(plan.model, ours, loaded[theirs])
    return plan.model.to(plan.device)  # type: ignore[no-any-return, arg-type]


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter that requires no gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter of a model by its full name."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = parameter


def dtype_to_run_in(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is the checkpoint's, but never float16 on a CPU."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    slow = device.type == "cpu" and stored in _slow_on_this_cpu()
    return torch.float32 if slow else stored


def _slow_on_this_cpu() -> tuple[torch.dtype, ...]:
    """Return the dtypes in which products take many times as long as in float32.

    Without AVX-512 or the like, bfloat16 takes a hundred times as long (0.5 GFLOP/s, not 40).
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    fast_bfloat16 = supported is None or supported()
    return (torch.float16,) if fast_bfloat16 else (torch.float16, torch.bfloat16)


def check_attention(attention: str) -> None:
    """Refuse flash attention without its package, which transformers would fetch from a hub."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ArgumentError(
            "attention flash_attention_2 needs the package flash_attn and a GPU, which are not "
            "here; use sdpa or eager"
        )


def torch_device(device: str) -> torch.device:
    """Resolve "auto" and check that the device exists."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except Exception as error:  # which class depends on the device
        raise ArgumentError(f"device {device!r} cannot be used here: {one_line(error)}") from None
    if target.type not in ("cpu", "cuda"):  # mps has no float64, in which scores are added
        raise ArgumentError(f"device {device!r} cannot be used here; use cpu or cuda")
    if target.type == "cuda" and target.index is None:
        # Some torch functions need the number, and the current device differs between threads.
        target = torch.device("cuda", torch.cuda.current_device())
    return target
