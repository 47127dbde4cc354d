"""hfprune doctor: versions and devices of this machine, and which implementations are used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from hfprune_fast._version import __version__
from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.layouts import native_families
from hfprune_fast.console import human_bytes
from hfprune_fast.engine.machine import available_bytes
from hfprune_fast.errors import one_line
from hfprune_fast.kernels import CPP_INSTRUCTIONS, CPP_UNUSED_REASON, TRITON_VERSION
from hfprune_fast.scoring.run import backend_for


def run() -> dict[str, Any]:
    """Return what was found; sizes in bytes, a missing thing as None."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus.append(f"{name}, {human_bytes(free_bytes)} free of {human_bytes(total_bytes)}")
    device = "cuda" if gpus else "cpu"
    return {
        "hfprune_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": TRITON_VERSION,
        "datasets": _version("datasets"),
        "lm_eval": _version("lm_eval"),
        "gpus": gpus,
        "device": device,
        "scoring_kernels": _scoring_kernels(device),
        "moving_weights": native.description(),
        "layout_native": _native_layout(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "memory_available_bytes": available_bytes(torch.device("cpu")),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def text(result: dict[str, Any]) -> str:
    """Return findings as human-readable text."""
    names = {key: key.removesuffix("_bytes").replace("_", " ") for key in result}
    width = max(map(len, names.values()))
    return "\n".join(f"{names[key]:{width}}  {_show(value)}" for key, value in result.items())


def _scoring_kernels(device: str) -> str:
    try:
        backend = backend_for(torch.empty(0, device=device), None, False)
    except ValueError as error:  # HFPRUNE_BACKEND names a backend that cannot run here
        return one_line(error)
    if backend == "cpp":
        return f"cpp ({CPP_INSTRUCTIONS[0].replace('avx', 'AVX')})"
    if device == "cpu" and not CPP_INSTRUCTIONS:
        return f"{backend}, slower: the C++ extension is not in use ({CPP_UNUSED_REASON})"
    return backend


def _native_layout() -> str:
    built = ", ".join(native_families()) or "no family"
    return f"transformers builds {built} by per_layer_config; others take layout custom or padded"


def _show(value: Any) -> str:
    if value is None:
        return "not installed"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return human_bytes(value) if isinstance(value, int) and value > 1 << 20 else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
