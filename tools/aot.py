"""Compile every kernel ahead of time, on a machine without a GPU, and read what was made.

    python tools/aot.py [--arch sm_90 ...] [--json FILE]

The launchers are called with tensors that have a shape and no memory, and triton works out the
launch as usual, stopped only where it would compile for this machine's GPU. So configurations,
options and divisibility are a real launch's (in triton 3.6 and 3.7). What it was about to compile
is compiled for each architecture. With --only-compile that is all: it fills TRITON_CACHE_DIR for
the next to launch. Else the exit status is 1, with a line for each fault, where a kernel does not
compile, or asks for more shared memory than the chip gives one program, or, on NVIDIA's,

- spills registers or has a stack,
- moves rows by loads or stores narrower than 16 bytes though the data allow 16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))  # not there with PYTHONSAFEPATH
from assembly import access_bytes, resources

from hfprune_fast.kernels import _dispatch, _kl_rows, _rows, _statistics
from hfprune_fast.kernels._activations import ACTIVATIONS, Gated
from hfprune_fast.kernels._criterion import Criterion
from hfprune_fast.kernels._triton import INTERPRETED, cdiv

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Of the bytes loaded in loops, and of those stored there: the remainder leaves room for a byte of
# token_mask beside 32 or more of the rows. One tensor of three in narrow loads leaves 2 in 3.
WIDE_SHARE = 0.9
ROW = "{:<32} {:<24} {:<7} {:>5} {:>10} {:>8} {:>7} {:>10} {:>10}"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """A launch to compile, and what to require of it."""

    kernel: str
    name: str
    launch: Callable[[], object]
    wide: bool = True  # the data allow 16-byte loads and stores
    stores: bool = True  # rows are written, not only read


class Launch(NamedTuple):
    """What triton was about to compile; arguments by path, (i,) for the i-th."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    options: Any
    attributes: dict[tuple[int, ...], Any]


class Report(NamedTuple):
    """What the compiler made of a case."""

    case: str
    kernel: str
    arch: str
    warps: int
    registers: int = 0
    shared_bytes: int = 0
    spills: int = 0  # bytes of stack and local memory
    loads: tuple[int, ...] = ()  # bytes a thread moves by each load in a loop
    stores: tuple[int, ...] = ()
    faults: tuple[str, ...] = ()

    def row(self) -> str:
        loads, stores = (f"{sum(n >= 16 for n in a)}/{len(a)}" for a in (self.loads, self.stores))
        numbers = self.warps, self.registers, self.shared_bytes, self.spills
        return ROW.format(self.case, self.kernel, self.arch, *numbers, loads, stores)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows_of(dtype: torch.dtype, vocab: int) -> Tensor:
    # As the buffers of the linear operations: 16-byte aligned for any vocab.
    return _meta(8192, cdiv(vocab, 16) * 16, dtype=dtype)[:, :vocab]


def _launch_rows(
    dtype: torch.dtype, grad_dtype: torch.dtype | None, vocab: int = 128_256, *,
    criterion: str = "entropy", softcap: float | None = None, logit_scale: float = 1.0,
) -> None:  # fmt: skip
    logits, row_scale, grad = _rows_of(dtype, vocab), None, None
    if grad_dtype is not None:
        row_scale = _meta(8192, dtype=torch.float32)
        grad = logits if grad_dtype == dtype else _rows_of(grad_dtype, vocab)
    keys = None if criterion == "entropy" else _meta(8192, dtype=torch.int64)
    _rows.rows_loss_and_grad(
        logits, row_scale, grad, Criterion(criterion, keys, alpha=0.4, temperature=0.5),
        softcap=softcap, logit_scale=logit_scale, backend=None,
    )  # fmt: skip


def _launch_kl(
    dtype: torch.dtype, grad_dtype: torch.dtype, vocab: int = 128_256, *,
    teacher_dtype: torch.dtype | None = None, transform: tuple[float | None, float] = (None, 1.0),
) -> None:  # fmt: skip
    logits, teacher_logits = _rows_of(dtype, vocab), _rows_of(teacher_dtype or dtype, vocab)
    grad = logits if grad_dtype == dtype else _rows_of(grad_dtype, vocab)
    row_scale = _meta(8192, dtype=torch.float32)
    _kl_rows.kl_rows_and_grad(logits, teacher_logits, row_scale, grad, transform, transform, None)


def _launch_taylor(
    dtype: torch.dtype, activation: str | None, masked: bool = False, *, layout: str = "separate",
    shape: tuple[int, int, int] = (8, 1024, 14_336),
) -> None:  # fmt: skip
    grad, gate, up = (_meta(*shape, dtype=dtype) for _ in range(3))
    if layout == "fused":
        gate, up = _meta(*shape[:2], 2 * shape[2], dtype=dtype).chunk(2, dim=2)
    gated = None if activation is None else Gated(gate, up, gate, up, activation)
    _statistics.taylor_sums(
        grad, gated or gate,
        token_mask=_meta(*shape[:2], dtype=torch.bool) if masked else None,
        parity=False, grad_scale=1.0, backend=None,
    )  # fmt: skip


def _cases() -> Iterator[Case]:
    case = partial(Case, "_rows_kernel")
    for name, dtype in _DTYPES.items():
        yield case(f"{name} forward", partial(_launch_rows, dtype, None), stores=False)
        yield case(f"{name} gradient in place", partial(_launch_rows, dtype, dtype))
    bf16, fp16, fp32 = _DTYPES.values()
    yield case("fp32 logits, bf16 gradient", partial(_launch_rows, fp32, bf16))
    yield case("fp32 logits, fp16 gradient", partial(_launch_rows, fp32, fp16))
    transform = {"softcap": 30.0, "logit_scale": 0.5}
    yield case("bf16 softcap, scale", partial(_launch_rows, bf16, bf16, **transform))
    yield case("bf16 odd V", partial(_launch_rows, bf16, bf16, 32_001))
    yield case("fp32 odd V, bf16 gradient", partial(_launch_rows, fp32, bf16, 32_001))
    for criterion in ("cross_entropy", "fisher", "self_distillation"):
        launch = partial(_launch_rows, criterion=criterion)
        for name, dtype in _DTYPES.items():
            yield case(f"{name} {criterion}", partial(launch, dtype, dtype))
        yield case(f"fp32 {criterion}, bf16 gradient", partial(launch, fp32, bf16))
        yield case(f"bf16 {criterion} softcap, scale", partial(launch, bf16, bf16, **transform))
        yield case(f"bf16 {criterion} odd V", partial(launch, bf16, bf16, 32_001))

    case = partial(Case, "_kl_rows_kernel")
    for name, dtype in _DTYPES.items():
        yield case(f"{name} kl", partial(_launch_kl, dtype, dtype))
    yield case("fp32 kl, bf16 gradient", partial(_launch_kl, fp32, bf16))
    yield case("bf16 kl softcap, scale", partial(_launch_kl, bf16, bf16, transform=(30.0, 0.5)))
    yield case("bf16 kl odd V", partial(_launch_kl, bf16, bf16, 32_001))
    mixed = partial(_launch_kl, fp32, fp32, teacher_dtype=bf16)
    yield case("fp32 kl, bf16 teacher", mixed)

    case = partial(Case, "_taylor_kernel")
    for (name, dtype), masked in product(_DTYPES.items(), (False, True)):
        suffix = " token_mask" if masked else ""
        yield case(f"{name}{suffix}", partial(_launch_taylor, dtype, None, masked), stores=False)
        for activation in ACTIVATIONS:
            launch = partial(_launch_taylor, dtype, activation, masked)
            yield case(f"{name} gated {activation}{suffix}", launch)
    gated = partial(_launch_taylor, bf16, "silu")
    yield case("bf16 gated silu fused", partial(gated, layout="fused"))
    odd = partial(gated, shape=(8, 1024, 7581))  # as pruned without rounding
    yield case("bf16 gated silu odd F", odd, wide=False)

    case = partial(Case, "_add_partials_kernel", stores=False)
    yield case("partials", gated)
    yield case("partials of one sequence", partial(gated, shape=(1, 1024, 14_336)))
    yield case("partials odd F", odd, wide=False)


CASES = tuple(_cases())


def record(launch: Callable[[], object], arch: str) -> list[Launch]:
    """Return what a call's launches would compile on a GPU of arch; nothing runs."""
    launches = []

    def note(kernel: JITFunction[Any], *args: Any) -> None:
        _key, signature, _device, constants, options, attributes, _warmup = args
        launches.append(Launch(kernel, signature, constants, options, attributes))

    fake_driver = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda _device: 0,
        get_current_target=lambda: TARGETS[arch],
    )
    with (
        mock.patch.object(driver, "_active", fake_driver),
        # Without a compiled kernel to come back, triton launches nothing.
        mock.patch.object(JITFunction, "_do_compile", note),
        mock.patch.object(_dispatch, "architecture", return_value=arch),
        mock.patch.object(_dispatch, "resolve_backend", return_value="triton"),
    ):
        launch()
    return launches


def check(case: Case, arch: str, only_compile: bool = False) -> list[Report]:
    """Compile the launches of a case's kernel."""
    launches = [one for one in record(case.launch, arch) if one.kernel.__name__ == case.kernel]
    assert launches, f"{case.name} does not launch {case.kernel}"
    return [_report(case, arch, launch, only_compile) for launch in launches]


def _report(case: Case, arch: str, launch: Launch, only_compile: bool) -> Report:
    report = Report(case.name, case.kernel, arch, launch.options.num_warps)
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        compiled = triton.compile(source, TARGETS[arch], launch.options.__dict__)
    except Exception as error:  # of the front end, LLVM or ptxas: a fault as any other
        return report._replace(faults=(f"does not compile: {' '.join(str(error).split())}",))
    if only_compile:
        return report
    made = report._replace(shared_bytes=compiled.metadata.shared)
    if "cubin" in compiled.asm:
        registers, spills = resources(compiled.asm["cubin"])
        loads, stores = access_bytes(compiled.asm["ptx"])
        made = made._replace(registers=registers, spills=spills, loads=loads, stores=stores)
    return made._replace(faults=tuple(_faults(case, made)))


def _faults(case: Case, report: Report) -> Iterator[str]:
    limit = SHARED_LIMIT_BYTES[report.arch]
    if report.shared_bytes > limit:
        yield f"asks for {report.shared_bytes} bytes of shared memory, more than {limit}"
    if TARGETS[report.arch].backend != "cuda":
        return
    if report.spills:
        yield f"spills {report.spills} bytes"
    for what in ("loads", "stores"):
        sizes = getattr(report, what)
        narrow = [size for size in sizes if size < 16]
        if not sizes and (what == "loads" or case.stores):
            yield f"has no {what} in a loop: its hot path is not where this check looks"
        elif case.wide and sum(narrow) > (1 - WIDE_SHARE) * sum(sizes):
            yield f"{len(narrow)} of {len(sizes)} {what} in loops are narrower than 16 bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--match", default="", help="only cases whose names have this in them")
    parser.add_argument("--only-compile", action="store_true", help="look at nothing")
    args = parser.parse_args()
    if INTERPRETED:
        sys.exit("aot.py: TRITON_INTERPRET is set, and nothing compiles under it; unset it")
    header = "case", "kernel", "arch", "warps", "registers", "shared", "spills", "loads", "stores"
    print(ROW.format(*header), "  (loads and stores in loops: 16 bytes / all)", sep="")
    reports = []
    cases = [case for case in CASES if args.match in case.name]
    jobs = list(product(cases, args.arch, [args.only_compile]))
    # A cache of its own, where none is named: nothing stale is read, and no home is needed.
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        with ProcessPoolExecutor() as pool:
            for made in pool.map(check, *zip(*jobs, strict=True)):
                reports += made
                print(*(report.row() for report in made), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps([report._asdict() for report in reports], indent=1))
    faults = [f"{r.case}, {r.kernel}, {r.arch}: {fault}" for r in reports for fault in r.faults]
    print("", *faults, sep="\n")
    kernels = {report.kernel for report in reports}
    print(f"{len(reports)} compilations of {len(kernels)} kernels, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
