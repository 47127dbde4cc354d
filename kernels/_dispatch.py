"""Which implementation runs: "triton" (our kernels) or "torch" (plain operations, any device).

Asked for by name (`backend=`), else by HFPRUNE_BACKEND for a whole run, else triton for float32,
bfloat16 and float16 on a GPU and torch for all else. What was chosen runs or raises: nothing falls
back.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from hfprune_fast.kernels._triton import INTERPRETED, TRITON_VERSION

BACKENDS = ("torch", "triton")
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve_backend(backend: str | None, tensor: Tensor) -> str:
    """Return the backend for an operation on tensor.

    Raises:
        ValueError: a name that is not a backend, or triton where it cannot run, with the reason.
    """
    asked_by = "backend" if backend else "HFPRUNE_BACKEND"
    backend = backend or os.environ.get("HFPRUNE_BACKEND") or None
    if backend is None:
        fits = tensor.is_cuda and tensor.dtype in _TRITON_DTYPES
        backend, asked_by = ("triton" if fits else "torch"), "a GPU tensor"
    if backend not in BACKENDS:
        raise ValueError(f"{asked_by} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        _check_triton(asked_by, tensor)
    return backend


def _check_triton(asked_by: str, tensor: Tensor) -> None:
    if TRITON_VERSION is None:
        reason = "triton is not installed"
    elif tensor.dtype not in _TRITON_DTYPES:
        reason = f"the kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    elif not (tensor.is_cuda or INTERPRETED):
        reason = f"it needs a GPU (or TRITON_INTERPRET=1), got a tensor on {tensor.device}"
    else:
        return
    raise ValueError(f"{asked_by} asks for triton, but {reason}; backend='torch' runs everywhere")


@contextmanager
def undisturbed(tensor: Tensor) -> Iterator[None]:
    """Inside, the tensor's GPU is the current one, and autocast changes no dtype."""
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
    """Return a launch configuration: the architecture's own, else NVIDIA's (sm) or AMD's (gfx)."""
    name = architecture(device)
    return table.get(name) or table["gfx" if name.startswith("gfx") else "sm"]


@functools.cache
def _gpu_architecture(index: int | None) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
