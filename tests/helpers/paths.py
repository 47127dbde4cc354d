"""The implementations of every operation, and the dtypes that each takes."""

import pytest
import torch

from hfprune_fast.kernels import CPP_INSTRUCTIONS, TRITON_VERSION

needs_triton = pytest.mark.skipif(TRITON_VERSION is None, reason="triton is not installed")
needs_cpp = pytest.mark.skipif(not CPP_INSTRUCTIONS, reason="the C++ extension is not in use")
_KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU_DEFAULT = "cpp" if CPP_INSTRUCTIONS else "torch"

_CPP = pytest.param("cpp", marks=needs_cpp)
BACKENDS = ["torch", _CPP, pytest.param("triton", marks=needs_triton)]
PATHS = [
    *(pytest.param("torch", dtype) for dtype in [torch.float64, *_KERNEL_DTYPES]),
    *(pytest.param("cpp", dtype, marks=needs_cpp) for dtype in _KERNEL_DTYPES),
    *(pytest.param("triton", dtype, marks=needs_triton) for dtype in _KERNEL_DTYPES),
]
# For what takes the interpreter long and is held by quicker tests as well.
slow_in_triton = pytest.mark.parametrize(
    "backend", ["torch", _CPP, pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
)
# The interpreter takes long: half precision, whose maths is that of fp32, runs with what is slow.
every_path = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        path
        if path.values[0] != "triton" or path.values[1] == torch.float32
        else pytest.param(*path.values, marks=[needs_triton, pytest.mark.slow])
        for path in PATHS
    ],
)
