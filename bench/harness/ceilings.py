"""What the device does at best: bytes a second of a copy, and FLOPs of a large product."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from meter import DEVICE, GPU, Evictor, alternated_ms
from shapes import DTYPES


def ceilings(scale: str, dtypes: tuple[str, ...] = DTYPES) -> list[dict[str, float | str]]:
    """One entry a dtype; the copied bytes are counted as read and as written."""
    n = {"full": 8192, "small": 2048, "tiny": 64}[scale]
    source = torch.zeros({"full": 1 << 29, "small": 1 << 25, "tiny": 1 << 12}[scale], device=DEVICE)
    target, evict = torch.empty_like(source), Evictor()
    found: list[dict[str, float | str]] = []
    for name in dtypes:
        a, b = torch.randn(2, n, n, device=DEVICE).to(getattr(torch, name))
        out = torch.empty_like(a)
        product_ms, copy_ms = alternated_ms(
            partial(torch.mm, a, b, out=out), partial(target.copy_, source), evict,
            rounds=20 if GPU else 7,
        )  # fmt: skip
        found.append(
            {
                "dtype": name,
                "copy_gb_per_s": 2 * source.nbytes / statistics.median(copy_ms) / 1e6,
                "product_gflop_per_s": 2 * n**3 / statistics.median(product_ms) / 1e6,
            }
        )
    return found
