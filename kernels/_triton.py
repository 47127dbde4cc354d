"""The one place that imports triton; without it (macOS, Windows) everything runs on torch."""

from __future__ import annotations

from typing import Any

__all__ = ["INTERPRETED", "TRITON_VERSION", "cdiv", "jit", "tl"]

try:
    import triton
    import triton.language as tl

    TRITON_VERSION: str | None = triton.__version__
    # Triton's interpreter runs kernels on a CPU; @jit looks once, when a kernel is defined.
    INTERPRETED: bool = triton.knobs.runtime.interpret
except ImportError:
    tl = None
    TRITON_VERSION = None
    INTERPRETED = False


def jit(function: Any) -> Any:
    """Return `triton.jit(function)`; without triton the function itself, never launched."""
    return function if TRITON_VERSION is None else triton.jit(function)


def cdiv(numerator: int, denominator: int) -> int:
    """Return the quotient rounded up."""
    return -(-numerator // denominator)
