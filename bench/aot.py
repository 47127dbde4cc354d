"""Compile every kernel ahead of time, on a machine without a GPU, and read what the compiler made.

    python bench/aot.py [--arch sm_90 ...] [--jobs 2] [--json FILE]

The launchers themselves are called, with tensors that have a shape and no memory, so what is
compiled has the configuration, the divisibility and the options of a real launch. The exit status is
1 if a kernel spills registers, asks for more shared memory than the chip has, or lacks 16-byte loads
and stores where its data allow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel on one architecture."""

    case: str
    kernel: str
    arch: str
    num_warps: int
    registers: int
    shared_bytes: int
    spills: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int


@contextmanager
def recorded_launches(
    arch: str,
) -> Iterator[list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]]]:
    """Make kernel[grid](...) note its arguments and do nothing, as if on a GPU of arch."""
    launches: list[Any] = []

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", record))
        from hfprune_fast.kernels import entropy, taylor

        for module in (entropy, taylor):
            stack.enter_context(mock.patch.object(module, "architecture", lambda _: arch))
            stack.enter_context(mock.patch.object(module, "resolve_backend", lambda *_: "triton"))
        yield launches


def compile_launch(kernel, args, kwargs, target):
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs, debug=False)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)
