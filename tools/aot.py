"""Compile every kernel ahead of time, on a machine without a GPU, and read what was made.

    python tools/aot.py [--arch sm_90 ...] [--in-turn] [--json FILE]

The launchers are called with tensors that have a shape and no memory, and triton works out the
launch as usual, stopped only where it would compile for this machine's GPU. So configurations,
options and divisibility are a real launch's (in triton 3.6 and 3.7). What it was about to compile
is compiled for each architecture; with --in-turn each case for two of them, so that any three
cases that follow one another are compiled for all. With --only-compile that is all: it fills
TRITON_CACHE_DIR for the next to launch. Else the exit status is 1, with a line for each fault,
where a kernel does not compile, or asks for more shared memory than the chip gives one program, or,
on NVIDIA's,

- spills registers or has a stack,
- moves rows by loads or stores narrower than 16 bytes though the data allow 16,

or, a kernel of rows of logits, takes more instructions a logit in its loops than `aot_cases.py`
allows it, or exchanges anything between threads there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent))  # not there with PYTHONSAFEPATH
from aot_cases import CASES, Case
from assembly import Loop, access_bytes, loops, resources

from hfprune_fast.kernels import _dispatch
from hfprune_fast.kernels._triton import INTERPRETED

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
# Of those of a kernel without a loop: beside 32 bytes of a row, a thread may store 4 for its sum.
WIDE_SHARE_UNLOOPED = 0.85
IN_TURN = (
    ("sm_80", "sm_90"), ("sm_100", "gfx942"), ("sm_80", "sm_100"),
    ("sm_90", "gfx942"), ("sm_80", "gfx942"), ("sm_90", "sm_100"),
)  # fmt: skip
ROW = "{:<32} {:<24} {:<7} {:>5} {:>10} {:>8} {:>7} {:>10} {:>10} {:>13}"


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
    loops: tuple[Loop, ...] = ()  # of a kernel of rows of logits
    instructions: float = 0.0  # a logit in all of them
    faults: tuple[str, ...] = ()

    def row(self) -> str:
        loads, stores = (f"{sum(n >= 16 for n in a)}/{len(a)}" for a in (self.loads, self.stores))
        numbers = self.warps, self.registers, self.shared_bytes, self.spills
        return ROW.format(
            self.case, self.kernel, self.arch, *numbers, loads, stores, f"{self.instructions:.2f}"
        )


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
        # Whoever asks for the backend gets triton's, of tensors that are on no GPU.
        mock.patch.object(_dispatch, "_default", return_value="triton"),
        mock.patch.object(_dispatch, "_check_kernels"),
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
        loads, stores = access_bytes(compiled.asm["ptx"], looped=case.looped)
        made = made._replace(registers=registers, spills=spills, loads=loads, stores=stores)
    if case.logit_bytes:
        found = loops(compiled.asm)
        instructions = sum(case.logit_bytes * one.instructions / one.load_bytes for one in found)
        made = made._replace(loops=found, instructions=instructions)
    return made._replace(faults=tuple(_faults(case, made)))


def _faults(case: Case, report: Report) -> Iterator[str]:
    limit = SHARED_LIMIT_BYTES[report.arch]
    if report.shared_bytes > limit:
        yield f"asks for {report.shared_bytes} bytes of shared memory, more than {limit}"
    nvidia = TARGETS[report.arch].backend == "cuda"
    if report.instructions > (allowed := case.instructions[0 if nvidia else 1]):
        yield f"takes {report.instructions:.2f} instructions a logit, more than {allowed}"
    if case.logit_bytes and not report.loops:
        yield "has no loop that loads: its hot path is not where this check looks"
    if any(one.exchanges for one in report.loops):
        yield "exchanges between threads in a loop"
    if not nvidia:
        return
    if report.spills:
        yield f"spills {report.spills} bytes"
    share, where = (WIDE_SHARE, " in loops") if case.looped else (WIDE_SHARE_UNLOOPED, "")
    for what in ("loads", "stores"):
        sizes = getattr(report, what)
        narrow = [size for size in sizes if size < 16]
        if not sizes and (what == "loads" or case.stores):
            yield f"has no {what} in a loop: its hot path is not where this check looks"
        elif case.wide and sum(narrow) > (1 - share) * sum(sizes):
            yield f"{len(narrow)} of {len(sizes)} {what}{where} are narrower than 16 bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--in-turn", action="store_true", help="each case for two of them")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--match", default="", help="only cases whose names have this in them")
    parser.add_argument("--only-compile", action="store_true", help="look at nothing")
    args = parser.parse_args()
    if INTERPRETED:
        sys.exit("aot.py: TRITON_INTERPRET is set, and nothing compiles under it; unset it")
    header = (
        "case",
        "kernel",
        "arch",
        "warps",
        "registers",
        "shared",
        "spills",
        "loads",
        "stores",
        "instructions",
    )
    print(
        ROW.format(*header),
        "  (in loops: loads and stores of 16 bytes / all, and instructions a logit)",
        sep="",
    )
    reports = []
    cases = [case for case in CASES if args.match in case.name]
    jobs = [
        (case, arch, args.only_compile)
        for case, two in zip(cases, cycle(IN_TURN), strict=False)
        for arch in args.arch
        if arch in two or not args.in_turn
    ]
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
