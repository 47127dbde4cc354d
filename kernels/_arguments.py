"""Checks that several operations share; each raises ValueError with the argument's name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Far inside the range of fp32, so that products and quotients with usual numbers stay inside.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100


def check_transform(softcap: float | None, logit_scale: float, whose: str = "") -> None:
    """Raise ValueError unless softcap and logit_scale are in 2^-100 .. 2^100."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not _SMALLEST <= value <= _LARGEST:
            raise ValueError(
                f"{whose}{name} must be a positive number in 2^-100 .. 2^100, got {value}"
            )


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless temperature is in 2^-20 .. 2^20: it divides softcap and scale."""
    if not 2.0**-20 <= temperature <= 2.0**20:
        raise ValueError(
            f"temperature must be a positive number in 2^-20 .. 2^20, got {temperature}"
        )


def check_grad_scale(grad_scale: float) -> None:
    """Raise ValueError unless grad_scale is a power of two, whose removal is exact."""
    if not _SMALLEST <= grad_scale <= _LARGEST or math.frexp(grad_scale)[0] != 0.5:
        raise ValueError(f"grad_scale must be a power of two in 2^-100 .. 2^100, got {grad_scale}")


def check_float64(tensor: Tensor, teacher: Tensor, name: str) -> None:
    """Raise ValueError unless `name` and teacher_`name` are both float64 or neither."""
    if (teacher.dtype == torch.float64) != (tensor.dtype == torch.float64):
        raise ValueError(
            f"{name} and teacher_{name} must both be float64 or neither, "
            f"got {tensor.dtype} and {teacher.dtype}"
        )


def check_devices(first: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} must be on {first.device}, got {tensor.device}")


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raise ValueError unless logits are a (T, V) float tensor of unit stride along V."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"{name} must be a (T, V) float tensor, got {tuple(logits.shape)} {logits.dtype}"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"{name} must have unit stride along V, got strides {logits.stride()}")


def check_overwritten_logits(logits: Tensor, row_scale: Tensor) -> None:
    """Raise ValueError unless logits are rows of their own, with one factor each in row_scale."""
    check_logits(logits)
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"rows of logits must not overlap to be overwritten, got strides {logits.stride()}"
        )
    if row_scale.shape != logits.shape[:1]:
        raise ValueError(
            f"row_scale must be ({logits.shape[0]},), one factor a row, "
            f"got {tuple(row_scale.shape)}"
        )
    check_devices(logits, row_scale=row_scale)
    check_own_memory(logits, row_scale=row_scale)


def check_own_memory(logits: Tensor, **others: Tensor) -> None:
    """Raise ValueError if a tensor is read where the logits are overwritten."""
    first, end = _span(logits)
    for name, tensor in others.items():
        other_first, other_end = _span(tensor)
        if first < other_end and other_first < end:
            raise ValueError(f"{name} must be in memory of its own: the logits are overwritten")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor, and where its last element ends."""
    if tensor.numel() == 0:
        return 0, 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in sizes)
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
