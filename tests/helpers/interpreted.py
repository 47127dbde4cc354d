"""Triton's interpreter, mended where it does otherwise than a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from hfprune_fast.kernels import TRITON_VERSION


@contextmanager
def rounding_as_a_gpu() -> Iterator[None]:
    """Inside, fp32 is rounded to the nearest bfloat16; the interpreter truncates."""
    if TRITON_VERSION is None:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, source, dtype)
        values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        bits = values.view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(np.shape(source.data)), dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)
        yield
