"""Result files of machines that do not exist, with every operation, provider and kind of row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from records import Result, Row, row
from shapes import MODELS

# How many times the floor's time each takes, and how many times the input its memory is.
COST = {
    "ours, torch": (1.6, 0.4), "ours, cpp": (1.2, 0.1), "ours, triton": (1.05, 0.02),
    "HFPrune's arithmetic": (9.0, 7.5), "eager": (5.1, 4.0), "torch.compile": (2.2, 2.0),
    "Liger": (1.7, 0.9), "Cut Cross Entropy": (1.9, 0.1), "torch linear_cross_entropy": (2.4, 0.8),
    "ours, in place": (1.1, 0.0), "ours, out=": (1.06, 1.0),
    "index_select": (5.2, 1.0), "numpy.take, out=": (1.6, 1.0), "ours": (1.7, 0.5),
    "ours, offload=none": (1.7, 0.5), "ours, offload=disk": (2.4, 0.2), "cp": (1.0, 0.0),
}  # fmt: skip
CROSS_ENTROPY = ("Liger", "Cut Cross Entropy", "torch linear_cross_entropy")
OURS = ("ours, torch", "ours, cpp", "ours, triton")
ENTROPY = (*OURS, "HFPrune's arithmetic", "eager", "torch.compile")
COMPACT = ("ours, in place", "ours, out=", "index_select", "numpy.take, out=")
WIDTH = {"bfloat16": 2, "float32": 4}

# The pages whose words are written by hand, with little but where their tables are put.
PAGES = {
    "README.md": "| 20% of the neurons removed by |\n|---|\n\n",
    "docs/evidence.md": "".join(
        f"## {title}\n\nwords\n\n"
        for title in (
            "Claims", "Against other methods", "On other texts, and in generation",
            "On small models", "What each part gives", "Which criterion",
            "How many calibration windows",
        )
    ),
    "docs/experts.md": "## What was measured\n\n",
    "docs/recovery.md": "## What was measured\n",
}  # fmt: skip


def write_pages(root: Path) -> None:
    (root / "docs").mkdir(exist_ok=True)
    for name, text in PAGES.items():
        (root / name).write_text(text, encoding="utf-8")


def invented(device: str = "cpu", date: str = "2030-01-02") -> Result:
    """A machine's result: a CPU's, on which two peers are skipped, or a GPU's."""
    gpu = device == "cuda"
    copy, product = (3000.0, 700_000.0) if gpu else (20.0, 150.0)
    machine: dict[str, Any] = {
        "name": "inventa-9-2core", "device": device, "processor": "Inventa 9", "cores": 2,
        "memory_bytes": 16_000_000_000,
    }  # fmt: skip
    if gpu:
        machine = {
            "name": "inventa-g1", "device": device, "processor": "Inventa G1",
            "memory_bytes": 80_000_000_000, "driver": "999.1",
        }  # fmt: skip
    return {
        "machine": machine,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1"},
        "threads": 2,
        "date": f"{date}T15:00:00+00:00",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "uncommitted_changes": False,
        "ceilings": [
            {"dtype": "bfloat16", "copy_gb_per_s": copy, "product_gflop_per_s": product},
            {"dtype": "float32", "copy_gb_per_s": copy, "product_gflop_per_s": product / 2},
        ],
        "rows": [_row(gpu, copy, product, *case) for case in _cases(gpu)],
    }  # fmt: skip


def _cases(gpu: bool) -> Iterator[tuple[Row, str, int, int, str, Row]]:
    """What identifies a row, provider, bytes, FLOPs, floor, and what else is in the row."""

    def of(names: Any, op: str, model: str, dtype: str, sizes: Row, moved: int, *rest: Any) -> Any:
        identity = {"op": op, "model": model, "dtype": dtype, "sizes": sizes}
        return ((identity, name, moved, *(rest or (0, "copy", {}))) for name in names)

    t, jobs = 8192 if gpu else 256, ("ours", "HFPrune's arithmetic")
    for model, (d, f, v) in MODELS.items():
        for dtype, width in WIDTH.items():
            shape = model, dtype
            yield from of(ENTROPY, "softmax_entropy", *shape, {"T": t, "V": v}, t * v * width)
            for op, sizes, numbers in (
                ("softmax_entropy_grad", {"T": t, "V": v}, 2 * t * v),
                ("gated_taylor", {"T": t, "F": f}, 5 * t * f),
                ("taylor_statistics", {"T": t, "F": f}, 2 * t * f),
            ):
                yield from of(ENTROPY, op, *shape, sizes, numbers * width)
            moved, flops = (2 * t * d + v * d) * width, 4 * t * d * v
            names, sizes = (*ENTROPY, *CROSS_ENTROPY), {"T": t, "D": d, "V": v}
            yield from of(names, "linear_entropy", *shape, sizes, moved, flops, "products", {})
    params = 250_000_000
    sizes = {"T": 1024, "D": 512, "L": 16, "V": 32000, "params": params}
    counts = 2 * params, 4096 * params, "products"
    yield from of(jobs, "score", "", "bfloat16", sizes, *counts, {})
    sizes = {"T": 4096, "D": 2048, "L": 20, "V": 128256, "params": 2_470_000_000}
    counts = 4_947_000_000, 16384 * 2_470_000_000, "products"
    for name, mapped in ("none", 4_947_000_000), ("disk", 528_000_000):
        more = {"mapped_bytes": mapped}
        yield from of([f"ours, offload={name}"], "score", "", "bfloat16", sizes, *counts, more)
    sizes = {"T": 2048, "D": 128, "L": 4, "V": 2048, "params": 1_049_728}
    counts = 4_200_000, 10**12, "products"
    yield from of(jobs, "whole_job", "demo", "float32", sizes, *counts, {"kept_overlap": 0.991})
    if gpu:
        return
    shape = "Llama-3.1-8B", "bfloat16", {"D": 4096, "F": 14336}
    for op in ("compact_rows", "compact_columns"):
        yield from of(COMPACT, op, *shape, 187_891_712, 0, "memcpy", {})
    shape = "", "bfloat16", {"L": 20}
    yield from of(("ours", "cp"), "prune_checkpoint", *shape, 1_683_754_533, 0, "cp", {})


def _row(
    gpu: bool, copy: float, product: float, identity: Row, name: str, moved: int, flops: int,
    floor: str, more: Row,
) -> Row:  # fmt: skip
    cross = name in CROSS_ENTROPY and identity["op"] == "linear_entropy"
    computes = "cross entropy" if cross else "entropy"
    identity = identity | {"provider": name, "computes": computes}
    if not gpu and name in ("ours, triton", "Liger", "Cut Cross Entropy"):
        return {**identity, "skipped": "needs a GPU"}
    if gpu and name == "ours, cpp":
        return {**identity, "skipped": "needs a CPU"}
    if identity["dtype"] == "float32" and name == "Cut Cross Entropy":
        return {**identity, "skipped": "its gradients are for bfloat16 and float16"}
    time, memory = COST[name]
    peak = int(memory * (flops / identity["sizes"].get("D", 512) if flops else moved))
    if gpu and peak > 35e9:
        return {**identity, "failed": "out of memory"}
    product /= WIDTH[identity["dtype"]] / 2
    floor_ms = flops / product / 1e6 if flops else moved / copy / 1e6
    times_ms = [time * floor_ms * (1 + 0.01 * i) for i in range(-3, 4)]
    return more | row(
        identity, times_ms, [floor_ms] * 7, floor=floor, bytes_moved=moved, flops=flops,
        peak_bytes=peak, error=0.0012, error_allowed=0.0031,
    )  # fmt: skip


def cells(text: str, *starts: str) -> list[str]:
    """Return what the first line of a table that begins with these cells has after them."""
    for line in text.splitlines():
        found = [part.strip().strip("*") for part in line.strip("|").split("|")]
        if tuple(found[: len(starts)]) == starts:
            return found[len(starts) :]
    raise AssertionError(f"no line of {starts}")
