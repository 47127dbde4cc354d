"""What the tests on a GPU share: inputs on the device, memory that holds NaN, sizes that fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS_32 = torch.finfo(FP32).eps


def need_gib(gib: float) -> None:
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    if free_gib < gib:
        pytest.skip(f"needs {gib} GiB of device memory, {free_gib:.0f} GiB are free")


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(64, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE).mul_(scale)


def blocks(rows: int, size: int = 256) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def smallest_step(dtype: torch.dtype) -> float:
    """Distance of the smallest numbers of dtype that fp32 maths may not flush to 0."""
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(FP32).smallest_normal)


def gated_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = BF16, *, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    grad = randn(*shape, dtype=dtype, scale=0.01)
    if not fused:
        return grad, randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    return grad, *randn(*shape[:2], 2 * shape[2], dtype=dtype).chunk(2, dim=2)
