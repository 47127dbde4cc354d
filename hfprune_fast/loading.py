"""Checkpoints through transformers: their config, their size, the model whole or not at all.

No code that came with a model is run, and a model is only loaded when the checkpoint's tensors are
exactly those that its config calls for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfprune_fast.architectures import ModelSize, size_of
from hfprune_fast.checkpoint import TensorInfo, check_tensors_are, open_checkpoint, read_config
from hfprune_fast.errors import ArgumentError, CheckpointError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_config(folder: Path) -> Any:
    """Return the transformers config of a folder that `read_config` accepts."""
    read_config(folder)
    from transformers import AutoConfig

    with _one_line_errors(f"{folder}/config.json is not a valid configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def model_size(folder: Path) -> ModelSize:
    """Count parameters from config.json alone."""
    return size_of(_meta_model(folder))


def _meta_model(folder: Path) -> PreTrainedModel:
    config = build_config(folder)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _one_line_errors(f"{folder}/config.json does not make a model"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def check_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return the headers of a checkpoint whose tensors are exactly those of transformers' model.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or not floating-point.
    """
    checkpoint = open_checkpoint(folder)
    headers, family = checkpoint.tensors, checkpoint.family
    model = _meta_model(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not any(name.startswith(f"{family.decoder}.") for name in headers):  # saved as base model
        expected = {n.removeprefix(f"{family.decoder}."): shape for n, shape in expected.items()}
    head = f"{family.head}.weight"
    if model.config.tie_word_embeddings and head not in headers:
        del expected[head]
    check_tensors_are(folder, headers, expected)
    return headers


def load_model(folder: Path, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference, or raise CheckpointError; never half of it.

    Args:
        folder: a model folder.
        dtype: "auto" (that of most of the checkpoint's parameters, but float32 for float16 on a
            CPU, which is slow in it) or "float32", "bfloat16", "float16", "float64".
        device: "auto" (cuda where there is one) or any torch device.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; a shard is damaged.
        ArgumentError: an unknown or absent device.
    """
    headers = check_tensors(folder)
    config = build_config(folder)
    target = torch_device(device)
    from transformers import AutoModelForCausalLM

    if dtype == "auto":
        dtype = _dtype_to_run_in(headers, target)
    with _one_line_errors(f"{folder} cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return model.eval().requires_grad_(False).to(target)  # type: ignore[no-any-return]


def _dtype_to_run_in(headers: Mapping[str, TensorInfo], device: torch.device) -> str:
    elements = Counter[str]()
    for info in headers.values():
        elements[info.dtype] += math.prod(info.shape)
    most = elements.most_common(1)[0][0] if elements else "F32"
    if most == "F16" and device.type == "cpu":
        return "float32"
    return {"F64": "float64", "BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    with _one_line_errors(f"{folder} has no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def torch_device(device: str) -> torch.device:
    """Resolve "auto" and check that the device exists."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device {device!r} cannot be used here: {one_line(error)}") from None
    if target.type in ("meta", "mps"):  # mps has no float64, in which scores are added
        raise ArgumentError(f"device {device!r} cannot be used here; use cpu or cuda")
    return target


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises over a bad folder into one line."""
    try:
        yield
    except Exception as error:  # it raises a dozen classes, some of them its dependencies'
        raise CheckpointError(f"{what}: {one_line(error)}") from error
