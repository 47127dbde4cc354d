"""The one place that imports triton; without it (macOS, Windows) all runs on the torch path."""

from __future__ import annotations

try:
    import triton

    TRITON_VERSION: str | None = triton.__version__
except ImportError:
    TRITON_VERSION = None
