"""Running a model that may be somebody else's: checked first, left as found, hidden states only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.architectures import ModelParts
from hfprune_fast.errors import ArgumentError, CalibrationError, NumericsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that is spread over devices or has NaN or inf in a parameter, named."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise ArgumentError(f"the model must be on one device, got {', '.join(sorted(devices))}")
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        # The extremes show NaN and inf without a mask as large as the tensor.
        extremes = torch.stack(torch.aminmax(parameter.detach()))
        if not bool(extremes.isfinite().all()):
            raise NumericsError(f"tensor {name} holds NaN or inf; the checkpoint is damaged")


def as_batches(batches: Any, batch_size: int = 1) -> Iterable[Any]:
    """Split one (N, T) tensor or array into batches; an iterable of batches stays what it is."""
    split: Iterable[Any] = batches
    if isinstance(batches, Tensor | np.ndarray):
        split = torch.as_tensor(batches).split(batch_size)
    return split


def check_ids(batch: Any, vocab: int) -> Tensor:
    """Return a batch as a non-empty (B, T) integer tensor of ids below vocab."""
    try:
        ids = torch.as_tensor(batch)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(
            f"token batches must be (B, T) integers, got {type(batch).__name__}"
        ) from None
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise CalibrationError(
            f"token batches must be non-empty (B, T) integers, got {tuple(ids.shape)} {ids.dtype}"
        )
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= vocab:
        raise CalibrationError(
            f"token ids must be in 0..{vocab - 1} (the vocabulary), got {low if low < 0 else high}"
        )
    return ids.to(torch.int64)


@contextmanager
def left_as_found(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside, both restored afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted_grad = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted_grad:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in wanted_grad:
            parameter.requires_grad_(True)


def final_hidden(parts: ModelParts, ids: Tensor) -> Tensor:
    """Return the head's input (B, T, D), after the final norm; no KV cache is kept."""
    ids = ids.to(parts.head.weight.device)
    hidden: Tensor = parts.decoder(input_ids=ids, use_cache=False).last_hidden_state
    return hidden
