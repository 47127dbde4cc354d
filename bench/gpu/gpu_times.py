"""Time every kernel beside its floor and its peers, or sweep the kernels' configurations.

`gpu_check.py` runs this in a process of its own, and reads the JSON file that it keeps up to date.
The cases and providers are those of the suites, the rows too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import bench_entropy
import bench_linear_entropy
import bench_taylor
import torch
from case import Case, measured
from ceilings import ceilings
from meter import DEVICE, GPU, alternated_ms, rounds_for
from records import Row
from shapes import Spec

from hfprune_fast.kernels import _rows as rows_module
from hfprune_fast.kernels import taylor as taylor_module
from hfprune_fast.kernels._dispatch import architecture, configuration

SCALE = "full" if GPU else "tiny"
SUITES = (bench_entropy, bench_linear_entropy, bench_taylor)
CASES: dict[str, type[Case]] = {op: case for suite in SUITES for op, case in suite.CASES.items()}
OURS = "ours, triton"
# {operation: % of the floor} that ours should reach at Llama-3.1-8B's shape in bf16. The entropy's
# kernel moves 3 bytes where its floor counts 2, if a row does not stay in the cache: 85 % of that.
TARGETS = {"softmax_entropy_grad": 85 * 2 / 3, "linear_entropy": 100 / 1.15, "gated_taylor": 85}
WORKSPACE_BYTES = 64 << 20  # that cuBLAS may take for itself


def wanted() -> list[tuple[Spec, str]]:
    """Every provider of every case; what has a target first, what takes longest to compile last,
    so that a time that runs out loses the rest.
    """
    pairs = [
        (spec, name)
        for suite in SUITES
        for spec in suite.specs(SCALE)
        for name in suite.CASES[spec.op].providers_of(spec)
    ]

    def order(pair: tuple[Spec, str]) -> tuple[bool, ...]:
        spec, name = pair
        return (
            not (has_target(spec) and name == OURS), name == "torch.compile",
            spec.dtype == "float32", spec.sweep is not None, spec.model != "Llama-3.1-8B",
        )  # fmt: skip

    return sorted(pairs, key=order)


def has_target(spec: Spec) -> bool:
    model = "Llama-3.1-8B" if GPU else ""
    return spec.op in TARGETS and spec.sweep is None and (spec.model, spec.dtype) == (
        model, "bfloat16",
    )  # fmt: skip


def judged(spec: Spec, found: Row) -> Row:
    """A row of ours with what became of its targets, those of memory too."""
    if found["provider"] != OURS or not has_target(spec) or "ms" not in found:
        return found
    target = TARGETS[spec.op]
    missed = []
    if found["percent_of_floor"] < target:
        missed.append(f"{found['percent_of_floor']:.1f} % of the floor, not {target:.0f}")
    if spec.op == "linear_entropy":
        itemsize = getattr(torch, spec.dtype).itemsize
        tokens, width, vocab = (spec.sizes[letter] for letter in "TDV")
        budget = max(256 << 20, 512 * vocab * itemsize)
        limit = budget + tokens * width * itemsize + WORKSPACE_BYTES
        if found["peak_bytes"] > limit:
            missed.append(f"{found['peak_bytes']:,} bytes, not {limit:,}")
    return {**found, "target_percent": target, "verdict": "; ".join(missed) or "pass"}


def rows(deadline: float) -> Iterator[Row]:
    """The rows of all that is wanted; what is not begun in time says so."""
    made: tuple[Spec, Case] | None = None
    for spec, name in wanted():
        if time.monotonic() > deadline:
            yield {**spec.identity, "provider": name, "skipped": "out of time"}
            continue
        if made is None or made[0] != spec:
            made = None  # before the next one takes its memory
            made = spec, CASES[spec.op](spec)
        print(f"{deadline - time.monotonic():6.1f} s left  {spec}, {name}", flush=True)
        yield judged(spec, measured(made[1], name))
        if GPU:
            torch.cuda.empty_cache()


def candidates(module: Any) -> list[dict[str, int]]:
    """The configuration in use, then others, those that differ in least first."""
    current = configuration(module._CONFIGS, DEVICE)
    if module is rows_module:
        axes = {"BLOCK_V": (4096, 8192, 16384), "STAGES": (2, 3, 4), "num_warps": (8, 16, 32)}
    else:
        axes = {
            "BLOCK_T": (4, 8, 16), "BLOCK_F": (64, 128, 256), "STAGES": (2, 3, 4),
            "num_warps": (2, 4, 8),
        }  # fmt: skip
        if "maxnreg" in current:  # AMD has no such option
            axes["maxnreg"] = (96, 128, 168)
    found = [current, *(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))]
    found.sort(key=lambda config: sum(config[name] != current[name] for name in axes))
    unique = [config for i, config in enumerate(found) if config not in found[:i]]
    return unique if GPU else unique[:3]


def tune(op: str, module: Any, small_sizes: dict[str, int], deadline: float) -> list[Row]:
    """Every candidate, checked at a small shape and then timed; best first."""
    spec = next(s for suite in SUITES for s in suite.specs(SCALE) if s.op == op and has_target(s))
    case, small = CASES[op](spec), CASES[op](Spec(op, "", spec.dtype, spec.sizes | small_sizes))
    provider = case.PROVIDERS[OURS]
    current = configuration(module._CONFIGS, DEVICE)
    results = []
    for config in candidates(module):
        result: Row = {"config": config, "current": config == current}
        results.append(result)
        if time.monotonic() > deadline:
            result["error"] = "out of time"
            continue
        with mock.patch.dict(module._CONFIGS, {architecture(DEVICE): config}):
            try:
                small.refill()
                result["error_norm"] = small.check(provider, provider.make(small)())[0]
                call = provider.make(case)
                rounds = rounds_for(call, case.ready, 0.04, 5, 50) if GPU else 1
                times_ms, _ = alternated_ms(call, case.floor, case.ready, rounds)
                result["median_ms"] = statistics.median(times_ms)
            except Exception as error:  # too much shared memory, a compiler's error: not this one
                text = " ".join(str(error).split())[:300]
                result["error"] = f"{type(error).__name__}: {text}"
    return sorted(results, key=lambda result: result.get("median_ms", float("inf")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["info", "timing", "tune"])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=150, help="start nothing new after this")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    result: dict[str, Any] = {}

    def save(**entries: Any) -> None:
        result.update(entries)
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(args.out)

    if args.what == "info":
        save(package=rows_module.__file__)
    elif args.what == "tune":
        halfway = (time.monotonic() + deadline) / 2
        found = {"softmax_entropy_grad": tune("softmax_entropy_grad", rows_module, {"T": 33},
                                              halfway)}  # fmt: skip
        save(tune=found)
        # The small shapes differ from the others in nothing that a kernel is compiled for.
        small = {"T": 288}
        found["gated_taylor"] = tune("gated_taylor", taylor_module, small, deadline)
        save(tune=found)
    else:
        save(ceilings=ceilings(SCALE), rows=[])
        for row in rows(deadline):
            result["rows"].append(row)
            save()


if __name__ == "__main__":
    main()
