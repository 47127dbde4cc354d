"""The two implementations of every operation, and the dtypes that each takes."""

import pytest
import torch

from hfprune_fast.kernels import TRITON_VERSION

needs_triton = pytest.mark.skipif(TRITON_VERSION is None, reason="triton is not installed")
_TRITON_DTYPES = [torch.float32, torch.bfloat16, torch.float16]

BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
PATHS = [
    *(pytest.param("torch", dtype) for dtype in [torch.float64, *_TRITON_DTYPES]),
    *(pytest.param("triton", dtype, marks=needs_triton) for dtype in _TRITON_DTYPES),
]
every_path = pytest.mark.parametrize(("backend", "dtype"), PATHS)
