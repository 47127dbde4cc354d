"""Time every kernel beside its floor and beside plain torch, or sweep the kernels' configurations.

`gpu_check.py` runs this in a process of its own, and reads the JSON file that it keeps up to date.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_cases import BF16, Case, cases, entropy_grad, gated
from gpu_timer import DEVICE, GPU, check, device_info, extra_bytes, size, time_all

from hfprune_fast.kernels import entropy as entropy_module
from hfprune_fast.kernels import taylor as taylor_module
from hfprune_fast.kernels._dispatch import architecture, configuration


def measure(case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
    case.refill()
    got = case.ours()
    want = case.plain()
    error = check(got, want)
    del got, want
    providers = {"ours": case.ours, "gemms": case.gemms, "eager": case.eager}
    calls = {name: call for name, call in providers.items() if call}
    notes = []
    try:
        times = time_all(calls, case.refill)
    except torch.OutOfMemoryError:  # of eager, which takes an order more than ours
        notes.append("eager: out of memory")
        calls.pop("eager", None)
        torch.cuda.empty_cache()
        times = time_all(calls, case.refill)
    ours_ms = times["ours"]["median_ms"]
    bytes_per_ms = ceilings["copy_gb_per_s"] * 1e6
    floor_ms = times["gemms"]["median_ms"] if case.gemms else case.floor_bytes / bytes_per_ms
    percent = 100 * floor_ms / ours_ms
    row = {
        "op": case.op, "shape": case.shape, "error": error, "times": times, "floor_ms": floor_ms,
        "percent_of_floor": percent, "target_percent": case.target_percent,
    }  # fmt: skip
    met = case.target_percent is None or percent >= case.target_percent
    if case.floor_bytes:
        row["floor_bytes"] = case.floor_bytes
        row["gb_per_s"] = case.floor_bytes / ours_ms / 1e6
    if case.least_bytes:
        row["percent_at_least_bytes"] = 100 * case.least_bytes / bytes_per_ms / ours_ms
        notes.append(f"{row['percent_at_least_bytes']:.0f} % at 4 B a logit")
    if case.flops:
        row["flops"] = case.flops
        row["tflops"] = case.flops / ours_ms / 1e9
        row["flops_floor_ms"] = case.flops / (ceilings["gemm_tflops"] * 1e9)
        notes.append(f"{ours_ms / floor_ms:.3f} x its products")
    if case.extra_bytes_limit:
        row["extra_bytes"] = extra_bytes(case.ours)
        row["extra_bytes_limit"] = case.extra_bytes_limit
        met = met and row["extra_bytes"] <= case.extra_bytes_limit
        mib = row["extra_bytes"] / 2**20, case.extra_bytes_limit / 2**20
        notes.append(f"{mib[0]:.0f} of {mib[1]:.0f} MiB")
    if case.target_percent is not None:
        row["verdict"] = "pass" if met else "missed"
    return {**row, "note": "; ".join(notes)}


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and bf16 FLOPs of a large product."""
    source = torch.randn(size(1 << 30), dtype=BF16, device=DEVICE)
    target = torch.empty_like(source)
    copy = time_all({"": partial(target.copy_, source)}, lambda: None)[""]
    n = size(8192)
    a, b = torch.randn(2, n, n, dtype=BF16, device=DEVICE)
    out = torch.empty_like(a)
    gemm = time_all({"": partial(torch.mm, a, b, out=out)}, lambda: None)[""]
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy["median_ms"] / 1e6,
        "gemm_tflops": 2 * n**3 / gemm["median_ms"] / 1e9,
        "copy_bytes": 2 * source.nbytes,
        "gemm_size": n,
    }


def candidates(module: Any) -> list[dict[str, int]]:
    """The configuration in use, then others, those that differ in least first."""
    current = configuration(module._CONFIGS, DEVICE)
    if module is entropy_module:
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


def tune(
    module: Any, make: Callable[..., Case], small_shape: dict[str, int], deadline: float
) -> list[dict[str, Any]]:
    """Every candidate, checked at a small shape and then timed; best first."""
    case, small = make(), make(**small_shape)
    current, *others = candidates(module)
    results = []
    for config in (current, *others):
        result: dict[str, Any] = {"config": config, "current": config == current}
        results.append(result)
        if time.monotonic() > deadline:
            result["error"] = "out of time"
            continue
        with mock.patch.dict(module._CONFIGS, {architecture(DEVICE): config}):
            try:
                small.refill()
                result["error_norm"] = check(small.ours(), small.plain())
                result |= time_all({"": case.ours}, case.refill, budget_ms=40)[""]
            except Exception as error:  # too much shared memory, a compiler's error: not this one
                result["error"] = one_line(error)
    return sorted(results, key=lambda result: result.get("median_ms", float("inf")))


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
        save(device=device_info(), package=entropy_module.__file__)
    elif args.what == "tune":
        halfway = (time.monotonic() + deadline) / 2
        rows = partial(entropy_grad, 128_256)
        found = {"softmax_entropy_grad_": tune(entropy_module, rows, {"tokens": 33}, halfway)}
        save(tune=found)
        # The small shapes differ from the others in nothing that a kernel is compiled for.
        small = {"batch": 3, "seq_len": 144}
        found["gated_taylor"] = tune(taylor_module, partial(gated, 14_336), small, deadline)
        save(tune=found)
    else:
        save(ceilings=ceilings(), rows=[], errors=[])
        for make in cases():
            name = f"{make.func.__name__}{make.args}{make.keywords or ''}"
            print(f"{args.seconds - (deadline - time.monotonic()):6.1f} s  {name}", flush=True)
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not started within {args.seconds:.0f} s")
                result["rows"].append(measure(make(), result["ceilings"]))
            except Exception as error:
                result["errors"].append(f"{name}: {one_line(error)}")
            save()
            if GPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
