"""Models of transformers without weights: what a config.json calls for, by name and shape."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfprune_fast.checkpoint.config_json import dtype_of, read_config, text_config
from hfprune_fast.checkpoint.pretrained import load_config
from hfprune_fast.errors import CheckpointError, one_line_errors
from hfprune_fast.models.declared import family_type
from hfprune_fast.models.registration import class_names
from hfprune_fast.models.spec import ModelSpec, spec_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch also keeps such a context's device in a global: two at a time would leave it at meta.
_META_CONTEXT = threading.Lock()
_MAX_BUFFER_ENTRIES = 1 << 24


def spec_from_config(folder: Path) -> tuple[ModelSpec, Any]:
    """Return the spec and the transformers config of a folder, from its config.json alone."""
    path, declared = folder / "config.json", read_config(folder)
    text = text_config(path, declared)
    base = class_names(str(family_type(declared)))["AutoModel"]
    if declared.get("architectures") == [base] and text.get("tie_word_embeddings") is not True:
        raise CheckpointError(f"{path} is of a {base}, a model without a head; give one with it")
    config = load_config(folder, text)
    with one_line_errors(f"{path} does not make a model"):
        spec = spec_of(skeleton(config))
    config.dtype = dtype_of(path, text)
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
    if dtype == torch.float64:  # for which grouped products of experts are not made
        config._experts_implementation = "eager"
    with _META_CONTEXT, torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    config.dtype = dtype
    entries = sum(buffer.numel() for buffer in model.buffers())
    if entries > _MAX_BUFFER_ENTRIES:
        raise ValueError(f"its rotary tables would hold {entries} numbers")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # so that _init_weights skips it
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            unset, of_run = 0.0, buffer.dtype
            if buffer.is_floating_point():
                unset = torch.nan
                of_run = buffer.dtype if name.endswith("inv_freq") else dtype
            module._buffers[name] = torch.full_like(buffer, unset, dtype=of_run, device="cpu")
    for module in model.modules():  # as from_pretrained computes what no checkpoint has
        if not isinstance(module, nn.Linear):  # these have no buffers, and take the longest
            model._init_weights(module)
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in stored and not bool(buffer.isfinite().all()):
            raise ValueError(f"transformers does not say how {name} is computed")
    return model.eval()  # type: ignore[no-any-return]
