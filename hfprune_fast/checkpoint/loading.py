"""Checkpoints as models of transformers: its classes, our tensors, the model whole or not at all.

No code that came with a model is run, and a model is only made when the checkpoint's tensors are
exactly those that its config calls for, by name: a checkpoint whose names transformers would
convert while loading is refused.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.checkpoint.source import (
    TORCH_DTYPES,
    Checkpoint,
    TensorInfo,
    check_tensors_are,
    open_checkpoint,
    read_config,
)
from hfprune_fast.errors import ArgumentError, CheckpointError, one_line
from hfprune_fast.models.spec import ModelSize, size_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# torch notes the device of such a context in a global too: two at a time would leave it at meta.
_META_CONTEXT = threading.Lock()


def build_config(folder: Path) -> Any:
    """Return the transformers config of a folder that `read_config` accepts."""
    read_config(folder)
    from transformers import AutoConfig

    with _one_line_errors(f"{folder}/config.json is not a valid configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def model_size(folder: Path) -> ModelSize:
    """Count parameters from config.json alone."""
    return size_of(_skeleton(folder))


def _skeleton(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model without weights: parameters on meta, buffers (rotary tables) computed.

    Other threads may run models meanwhile, so nothing that they see is changed: the meta device
    is a context of this thread, and transformers gets no dtype, which it would make the default
    of the whole process.
    """
    config = build_config(folder)
    from transformers import AutoModelForCausalLM

    config.dtype = None
    with (
        _one_line_errors(f"{folder}/config.json does not make a model"),
        _META_CONTEXT,
        torch.device("meta"),
    ):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    config.dtype = dtype
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
    """A model without its weights, and where each of them is in its checkpoint."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    names: dict[str, str]  # of the model's parameters -> of the checkpoint's tensors
    dtype: torch.dtype  # to run in
    device: torch.device


def blueprint(folder: Path, *, dtype: str = "auto", device: str = "auto") -> Blueprint:
    """Prepare a checkpoint to run.

    Args:
        folder: a model folder.
        dtype: "auto" (that of most of the checkpoint's parameters, but float32 for float16 on a
            CPU, which is slow in it) or "float32", "bfloat16", "float16", "float64".
        device: "auto" (cuda where there is one) or any torch device.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or not floating-point.
        ArgumentError: an unknown or absent device.
    """
    checkpoint = open_checkpoint(folder)
    target = torch_device(device)
    if dtype == "auto":
        to_run_in = dtype_to_run_in(_most_stored(checkpoint.tensors), target)
    else:
        to_run_in = getattr(torch, dtype)
    model = _skeleton(folder, to_run_in)
    decoder, head = f"{checkpoint.family.decoder}.", f"{checkpoint.family.head}.weight"
    state = model.state_dict()
    names = {name: name for name in state}
    if not any(name.startswith(decoder) for name in checkpoint.tensors):  # saved as base model
        names = {name: name.removeprefix(decoder) for name in state}
    expected = {theirs: tuple(state[ours].shape) for ours, theirs in names.items()}
    if model.config.tie_word_embeddings:
        names[head] = names[f"{decoder}{checkpoint.family.embedding}.weight"]
        if head not in checkpoint.tensors:
            del expected[head]
    check_tensors_are(folder, checkpoint.tensors, expected)
    return Blueprint(checkpoint, model, names, to_run_in, target)


def load_model(folder: Path, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference, or raise CheckpointError; never half of it.

    On a CPU, weights that are stored in the dtype asked for stay in the file, mapped: they take
    memory that the system can reuse, and changes are never written back.

    Arguments and errors are those of `blueprint`.
    """
    return build(blueprint(folder, dtype=dtype, device=device))


def build(plan: Blueprint) -> PreTrainedModel:
    """Return a blueprint's model with all of its weights in place."""
    mapped = {
        path.name: torch.UntypedStorage.from_file(str(path), False, os.path.getsize(path))
        for path in plan.checkpoint.paths
    }

    def load(name: str) -> Tensor:
        info = plan.checkpoint.tensors[name]
        stored = TORCH_DTYPES[info.dtype]
        place = plan.checkpoint.files[info.file].tensors[name][2]
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
    """Return a tensor as a parameter that no gradient is wanted of."""
    return nn.Parameter(tensor, requires_grad=False)


def put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a model a parameter of that name."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = parameter


def dtype_to_run_in(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what "auto" is for a checkpoint that is stored mostly in one dtype."""
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def _most_stored(headers: Mapping[str, TensorInfo]) -> torch.dtype:
    elements = Counter[str]()
    for info in headers.values():
        elements[info.dtype] += math.prod(info.shape)
    return TORCH_DTYPES[elements.most_common(1)[0][0]]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    with _one_line_errors(f"{folder} has no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def torch_device(device: str) -> torch.device:
    """Resolve "auto" and check that the device exists."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device {device!r} cannot be used here: {one_line(error)}") from None
    if target.type in ("meta", "mps"):  # mps has no float64, in which scores are added
        raise ArgumentError(f"device {device!r} cannot be used here; use cpu or cuda")
    if target.type == "cuda" and target.index is None:
        # Some of torch asks for the number, and the current device is another in each thread.
        target = torch.device("cuda", torch.cuda.current_device())
    return target


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises over a bad folder into one line."""
    try:
        yield
    except Exception as error:  # it raises a dozen classes, some of them its dependencies'
        raise CheckpointError(f"{what}: {one_line(error)}") from error
