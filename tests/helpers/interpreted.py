"""Triton's interpreter, made quicker, and mended where it does otherwise than a GPU."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from hfprune_fast.kernels import TRITON_VERSION


def make_quicker() -> None:
    """Keep what the interpreter otherwise finds anew, to the same result.

    These are the functions of the language that it replaces, for which it looks through several
    modules at each launch and at each call within a kernel, and numpy's dtype of each tensor.
    """
    if TRITON_VERSION is None:
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def replaceable(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if is_builtin(member)]

    def replace(place: Any, *how: Any) -> None:
        for name in replaceable(place):
            if is_builtin(member := getattr(place, name)):  # not replaced yet
                interpreter._patch_attr(place, name, member, *how)

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return (found if scalar.is_ptr() else kept)(scalar)  # types of pointers have no hash

    found, kept = interpreter._get_np_dtype, cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = numpy_dtype
    interpreter._patch_builtin = replace


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
