"""The one form of a result file, whoever measured: a suite under pytest, or `gpu_check.py`.

    {"machine": {"name": "amd-epyc-avx2-2core", "device": "cpu", "processor": ..., ...},
     "versions": {"torch": "2.13.0+cpu", ...}, "threads": 2, "date": ..., "commit": ...,
     "ceilings": [{"dtype": "bfloat16", "copy_gb_per_s": ..., "product_gflop_per_s": ...}],
     "rows": [row, ...]}

A row is one provider of one operation at one shape:

    op, dtype  softmax_entropy, linear_entropy, gated_taylor, score, ...; "float32", "bfloat16"
    model      whose shape it is: "Llama-3.1-8B", or "" for a shape of no known model
    sizes      {"T": 256, "D": 4096, "V": 32000}; of models their params too
    provider   "ours, torch", "ours, cpp", "ours, triton", "HFPrune's arithmetic", "eager", ...
    computes   "entropy", "KL", ..., or "cross entropy" for the peers that compute nothing else

and either `skipped` or `failed`, a reason in a line, or all of these that apply:

    ms, ms_low, ms_high, rounds     median, quartiles and number of the times
    floor, floor_ms                 the lower bound: "copy" of the bytes to move, "products", ...
    percent_of_floor, percent_low, percent_high
                                    median and quartiles of 100 · floor / time in each round
    bytes, gb_per_s, flops, gflop_per_s
                                    what any provider must do, and the rate of this one
    peak_bytes, mapped_bytes        memory beside the inputs; mapped pages of files beside that
    times_first, kept_overlap       of whole jobs: time / ours; share of kept neurons in common
    error, error_allowed            relative to the result's norm, checked before the timing
    verdict, ...                    on a GPU; see bench/gpu

Reading a result file needs the standard library alone, so torch is imported inside functions.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
Row = dict[str, Any]
Result = dict[str, Any]
KEY = ("op", "model", "dtype", "sizes", "provider")
_PACKAGES = (
    "hfprune_fast", "torch", "triton", "transformers", "numpy", "liger-kernel", "cut-cross-entropy",
)  # fmt: skip


def row(
    identity: Row, times_ms: list[float], floors_ms: list[float], *, floor: str,
    bytes_moved: int = 0, flops: int = 0, **measured: Any,
) -> Row:  # fmt: skip
    """Return a row from a provider's times and, as many, those of a floor beside it, if any."""
    found = {**identity, "rounds": len(times_ms)}
    found["ms_low"], ms, found["ms_high"] = quartiles(times_ms)
    found["ms"] = ms
    if floors_ms:
        percents = quartiles([100 * f / t for f, t in zip(floors_ms, times_ms, strict=True)])
        found |= {"floor": floor, "floor_ms": statistics.median(floors_ms)}
        found["percent_low"], found["percent_of_floor"], found["percent_high"] = percents
    found |= measured
    if bytes_moved:
        found |= {"bytes": bytes_moved, "gb_per_s": bytes_moved / ms / 1e6}
    if flops:
        found |= {"flops": flops, "gflop_per_s": flops / ms / 1e6}
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))  # type: ignore[return-value]


def key(found: Row) -> tuple[Any, ...]:
    """Return what identifies a row, in any file."""
    return *(found[k] for k in KEY if k != "sizes"), tuple(sorted(found["sizes"].items()))


def described() -> Result:
    """Return a result with everything but rows and ceilings: where, with what and when."""
    import torch

    cuda = torch.cuda.is_available()
    # But for result files, to which a run adds rows.
    status = "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"
    changed = _output("git", "-C", str(ROOT), *status)
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "machine": _gpu() if cuda else _cpu(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def write(result: Result, folder: Path, suffix: str = "") -> Path:
    """Write a result under its name, <machine>-<date>.json, a row a line; return the path."""
    path = folder / f"{result['machine']['name']}-{result['date'][:10]}{suffix}.json"
    head = {k: v for k, v in result.items() if k != "rows"}
    rows = ",\n".join(f"  {json.dumps(rounded(r))}" for r in result["rows"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


class ResultError(Exception):
    """A file that is no result; says in a line which and why."""


def read(path: Path) -> Result:
    """Return a result that has what its readers rely on; raise ResultError for another file."""
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        _of(result, {"machine": dict, "versions": dict, "date": str, "rows": list})
        _of(result["machine"], {"name": str, "device": str, "processor": str})
        for number, found in enumerate(result["rows"], 1):
            _of(found, {name: dict if name == "sizes" else str for name in KEY})
            if len(found.keys() & {"ms", "skipped", "failed"}) != 1:
                raise ValueError(f"row {number} has not one of 'ms', 'skipped' and 'failed'")
            if "ms" in found:
                times = dict.fromkeys(("ms", "ms_low", "ms_high"), (int, float))
                _of(found, times | {"rounds": int})
    except (OSError, ValueError) as error:  # json's and UTF-8's errors are ValueErrors
        raise ResultError(f"{path}: not a result file: {error}") from None
    return result


def _of(found: Any, kinds: dict[str, Any]) -> None:
    """Raise unless it is a dictionary with values of these kinds, numbers above 0."""
    if not isinstance(found, dict):
        raise ValueError(f"{str(found)[:40]!r} is no object")
    for name, kind in kinds.items():
        value = found.get(name)
        if not isinstance(value, kind) or (kind in (int, (int, float)) and not value > 0):
            raise ValueError(f"{name!r} cannot be {str(value)[:40]!r}")


def rounded(value: Any) -> Any:
    """Round floats to six digits, more than any clock has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return value


def _gpu() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": _slug(found.name), "device": "cuda", "processor": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None), "memory_bytes": found.total_memory,
        "driver": driver.splitlines()[0] if driver else None,
    }  # fmt: skip


def _cpu() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0))
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    processor = model[1].strip() if model else platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()  # AVX512, AVX2, DEFAULT, ...
    return {
        "name": f"{_slug(f'{processor} {instructions}')}-{cores}core", "device": "cpu",
        "processor": processor, "instructions": instructions, "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }  # fmt: skip


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
