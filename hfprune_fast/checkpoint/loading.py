"""Checkpoints as models of transformers: its classes, our tensors, the model whole or not at all.

No code that came with a model is run, and a model is only made when the checkpoint's tensors are
exactly those that its config calls for, by name: a checkpoint whose names transformers would
convert while loading is refused.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hfprune_fast.checkpoint.folder import TORCH_DTYPES
from hfprune_fast.checkpoint.skeleton import skeleton
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.errors import ArgumentError, one_line, one_line_errors
from hfprune_fast.kernels import slow_on_this_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Blueprint:
    """A model without weights, and where each weight is in its checkpoint."""

    source: ModelSource
    model: PreTrainedModel
    names: dict[str, tuple[str, ...]]  # as in ModelSource
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
    target = torch_device(device)
    to_run_in = dtype_to_run_in(dtype, source.stored_dtype, target)
    check_attention(attention)
    with one_line_errors(f"{source.folder}/config.json does not make a model"):
        model = skeleton(source.transformers_config, to_run_in, attention)
    return Blueprint(source, model, source.names, to_run_in, target)


def load_model(
    model: str | Path | ModelSource, *, dtype: str = "auto", device: str = "auto"
) -> PreTrainedModel:
    """Load a checkpoint for inference, or raise CheckpointError; never half of it.

    On a CPU, weights that are stored in the requested dtype stay in the file, mapped: they take
    memory that the system can reuse, and changes are never written back. Experts that are stored
    each in tensors of its own are copied.

    Arguments and errors are those of `blueprint`.
    """
    return build(blueprint(model, dtype=dtype, device=device))


def build(plan: Blueprint) -> PreTrainedModel:
    """Return a blueprint's model with all of its weights in place."""
    mapped = {
        name: torch.UntypedStorage.from_file(str(shard.path), False, os.path.getsize(shard.path))
        for name, shard in plan.source.shards.items()
    }

    def map_tensor(name: str) -> Tensor:
        info = plan.source.tensors[name]
        stored = TORCH_DTYPES[info.dtype]
        place = plan.source.shards[info.file].tensors[name][2]
        size = math.prod(info.shape) * stored.itemsize
        storage: Any = mapped[info.file]
        tensor = torch.empty(0, dtype=torch.uint8).set_(storage, place, (size,), (1,))
        if place % stored.itemsize:
            tensor = tensor.clone()
        tensor = tensor.view(stored).view(info.shape)
        return tensor.mT.contiguous() if name in plan.source.across else tensor

    def load(theirs: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        if len(theirs) == 1:
            return map_tensor(theirs[0]).to(plan.device, dtype)
        shape = plan.source.tensors[theirs[0]].shape
        merged = torch.empty((len(theirs), *shape), dtype=dtype, device=plan.device)
        for part, name in zip(merged, theirs, strict=True):
            part.copy_(map_tensor(name))
        return merged

    dtypes = {theirs: dtype_of_run(plan.model, o, plan.dtype) for o, theirs in plan.names.items()}
    loaded = {theirs: frozen(load(theirs, dtype)) for theirs, dtype in dtypes.items()}
    shapes = {ours: tensor.shape for ours, tensor in plan.model.state_dict().items()}
    for ours, theirs in plan.names.items():
        one = len(theirs) == 1
        put(plan.model, ours, loaded[theirs] if one else frozen(loaded[theirs].view(shapes[ours])))
    return plan.model.to(plan.device)  # type: ignore[no-any-return, arg-type]


def dtype_of_run(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter or buffer in a model that is run in `dtype`.

    A family's class keeps some in float32, such as what a router adds to scores of experts.
    """
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    if dtype.itemsize == 2 and any(f".{part}." in f".{name}." for part in kept):
        return torch.float32
    return dtype


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a parameter that requires no gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def put(model: nn.Module, name: str, parameter: Tensor) -> None:
    """Set a parameter or a buffer of a model by its full name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = parameter.detach()
    else:
        module._parameters[leaf] = cast("nn.Parameter", parameter)


def dtype_to_run_in(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" is the checkpoint's, but never float16 on a CPU."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    slow = stored == torch.float16 or slow_on_this_cpu(stored)
    return torch.float32 if device.type == "cpu" and slow else stored


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
