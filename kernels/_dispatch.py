"""The one place that chooses which implementation of an operation runs.

"triton" is our kernels for a GPU, "cpp" those for a CPU, "torch" plain operations on any device.
The choice is the `backend=` of the call, else HFPRUNE_BACKEND for a whole run, else for float32,
bfloat16 and float16 triton on a GPU and, where the C++ extension is in use, cpp on a CPU; torch for
all else. The implementation chosen runs or raises; nothing falls back.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from hfprune_fast.kernels._cpp import CPP_INSTRUCTIONS, CPP_UNUSED_REASON
from hfprune_fast.kernels._triton import INTERPRETED, TRITON_VERSION

BACKENDS = ("torch", "triton", "cpp")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Implementation = TypeVar("_Implementation")


def choose(
    implementations: Mapping[str, _Implementation], backend: str | None, tensor: Tensor
) -> _Implementation:
    """Return the implementation, of those in an operation's table, that runs on tensor.

    Raises:
        ValueError: as `resolve_backend`.
    """
    return implementations[resolve_backend(backend, tensor)]


def resolve_backend(backend: str | None, tensor: Tensor) -> str:
    """Return the name of the backend for an operation on tensor.

    Raises:
        ValueError: an unknown name, or triton or cpp where it cannot run, with the reason.
    """
    source = "backend" if backend else "HFPRUNE_BACKEND"
    backend = backend or os.environ.get("HFPRUNE_BACKEND") or None
    if backend is None:
        backend, source = _default(tensor), "the default for a GPU tensor"
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "torch":
        _check_kernels(backend, source, tensor)
    return backend


def _default(tensor: Tensor) -> str:
    if tensor.dtype not in _KERNEL_DTYPES:
        return "torch"
    if tensor.is_cuda:
        return "triton"
    return "cpp" if CPP_INSTRUCTIONS and tensor.device.type == "cpu" else "torch"


def _check_kernels(backend: str, source: str, tensor: Tensor) -> None:
    if backend == "triton" and TRITON_VERSION is None:
        reason = "triton is not installed"
    elif backend == "cpp" and not CPP_INSTRUCTIONS:
        reason = f"the C++ extension is not in use ({CPP_UNUSED_REASON})"
    elif tensor.dtype not in _KERNEL_DTYPES:
        reason = f"the kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    elif backend == "cpp" and tensor.device.type != "cpu":
        reason = f"it needs a CPU, got a tensor on {tensor.device}"
    elif backend == "triton" and not (tensor.is_cuda or INTERPRETED):
        reason = f"it needs a GPU (or TRITON_INTERPRET=1), got a tensor on {tensor.device}"
    else:
        return
    raise ValueError(f"{source} is {backend}, but {reason}; backend='torch' runs everywhere")


@contextmanager
def device_guard(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's GPU the current device and disable autocast, for the block."""
    kind = tensor.device.type
    with ExitStack() as stack:
        if kind == "cuda":  # triton launches on the current device, whatever its arguments
            stack.enter_context(torch.cuda.device(tensor.device))
        if torch.amp.is_autocast_available(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def architecture(device: torch.device) -> str:
    """Return the name of a GPU's architecture, such as sm_90 or gfx942; "cpu" for a CPU."""
    return _gpu_architecture(device.index) if device.type == "cuda" else "cpu"


def configuration(table: Mapping[str, dict[str, int]], device: torch.device) -> dict[str, int]:
    """Return a launch configuration: the architecture's own, else NVIDIA's (sm) or AMD's (gfx).

    Products and sums are fused, which not every version of triton does by default.
    """
    name = architecture(device)
    own = table.get(name) or table["gfx" if name.startswith("gfx") else "sm"]
    return {**own, "enable_fp_fusion": True}


@functools.cache
def _gpu_architecture(index: int | None) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
