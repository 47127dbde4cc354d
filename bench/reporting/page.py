"""docs/benchmarks.md: a few rows of the newest result files, with the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fidelity_tables
import recovery_tables
import report_text as text
from pictures import Picture
from records import Result, Row, key

# The first two of these that were measured stand for all shapes of an operation.
MODELS = ("Llama-3.1-8B", "Llama-2-7B", "Qwen2.5-7B", "Qwen3-0.6B")
SECTIONS = {
    "Whole models": ("score", "score_beside_another", "whole_job", "default_recipe"),
    "Kernels": (
        "softmax_entropy", "softmax_entropy_grad", "cross_entropy_grad", "fisher_grad",
        "linear_entropy", "linear_kl", "gated_taylor", "taylor_statistics", "rms_norm",
        "rotary", "removal_costs", "refit",
    ),
    "Compaction of weights": ("compact_rows", "compact_columns", "prune_checkpoint"),
}  # fmt: skip
INTRODUCTION = """\
# Benchmarks

This page is written by `python bench/reporting/report.py` from the files in
[bench/results](../bench/results/README.md), and a test fails where they disagree. `make bench`
measures on a CPU in 8 to 11 minutes, `python bench/gpu/gpu_check.py --out DIR` on a GPU, and
`python bench/reporting/compare.py A.json B.json` compares two results.

Every result was checked before it was timed: against fp64, with at most twice the error of plain
torch in the same dtype and what the result's own dtype explains. A time is a median; in brackets
how many times that of ours. The floor is the least that any implementation must do, timed beside
it in the same rounds. Memory is what was taken beside the inputs or, of whole models, beside the
weights that were there before; mapped is what of the checkpoint's files was in memory at a time;
`score_beside_another` runs while another process keeps one core busy; kept alike is the share of
the kept neurons that both keep. Those marked (cross entropy) compute the cross entropy of given
labels, not the entropy, on the same shapes. On a CPU without
instructions for bfloat16, products are measured in fp32. What was skipped has its reason in the
files of all rows."""


@dataclass
class Source:
    """A committed result file."""

    path: Path
    result: Result

    def __post_init__(self) -> None:
        machine = self.result["machine"]
        self.machine, self.device = machine["name"], machine["device"]
        # After the machine's name and the date, such as -large.
        self.suffix = self.path.stem[len(f"{self.machine}-2026-01-01") :]


def path(root: Path) -> Path:
    return root / "docs" / "benchmarks.md"


def link(root: Path, at: Path) -> str:
    return Path(os.path.relpath(at, root / "docs")).as_posix()


def markdown(
    root: Path,
    current: list[Source],
    models: list[fidelity_tables.Measured],
    drawn: dict[Path, Picture],
) -> str:
    lines, devices = [INTRODUCTION], {}
    for title, ops in SECTIONS.items():
        lines += ["", f"## {title}"]
        devices[title] = set()
        for source in current:
            of = text.grouped(source.result["rows"], lambda row: str(row["op"]))
            rows = [row for op in ops for row in _shown(of.get(op, []))]
            if rows:
                devices[title].add(source.device)
                names = ("torch",) if source.device == "cpu" else ("torch", "triton")
                caption = f"{text.when(source.result, names)}. {text.floors(rows)}"
                all_rows = f"[All rows]({link(root, source.path.with_suffix('.md'))})."
                table = text.rows_table(_beside_ours(rows), text.SHORT)
                lines += ["", f"{caption} {all_rows}", "", *table]
        for device, word in (("cpu", "CPU"), ("cuda", "GPU")):
            if device not in devices[title] and (device == "cpu" or "compact_rows" not in ops):
                lines += ["", f"Not measured on a {word} yet."]
    images = {at: f"![{picture.alt}]({link(root, at)})" for at, picture in drawn.items()}
    fidelity, recovery = (
        images.pop(tables.picture_path(root), "") for tables in (fidelity_tables, recovery_tables)
    )
    lines += ["", "## Pictures", "", "\n\n".join(images.values()) or "Nothing was measured yet."]
    lines += [
        "",
        "## Fidelity",
        "",
        *fidelity_tables.section(models, partial(link, root)),
        "",
        fidelity,
    ]
    lines += [
        "",
        "Models with experts: [experts](experts.md#what-was-measured). Numbers of calibration "
        "windows: [evidence](evidence.md#how-many-calibration-windows).",
    ]
    if recovery:
        lines += ["", "## Recovery", "", recovery_tables.HINT, "", recovery]
    return "\n".join(lines).rstrip() + "\n"


def _shown(rows: list[Row]) -> list[Row]:
    """Return the rows of an operation that the page has: of two known shapes, in bfloat16 if there
    are any, and of all other whole models.
    """
    rows = [row for row in rows if "skipped" not in row]
    others = [row for row in rows if not row["model"] and "L" in row["sizes"]]
    named = [row for row in rows if row["model"]]
    dtype = "bfloat16" if "bfloat16" in {row["dtype"] for row in named} else "float32"
    named = [row for row in named if row["dtype"] == dtype]
    models = sorted({row["model"] for row in named}, key=lambda m: (*MODELS, m).index(m))[:2]
    return [row for model in models for row in named if row["model"] == model] + others


def _beside_ours(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with how many times ours they take, of each shape."""
    found = []
    for its in text.grouped(rows, lambda row: str(key({**row, "provider": ""}))).values():
        mine = [row for row in its if row["provider"].startswith("ours") and "ms" in row]
        own = [row for row in mine if row["provider"] == text.own_provider(its)]
        ours = next(iter(own or mine), {})
        for row in its:
            row = dict(row)
            for name, field in (("times_ours", "ms"), ("memory_ours", "peak_bytes")):
                if row["provider"] != ours.get("provider") and row.get(field) and ours.get(field):
                    row[name] = row[field] / ours[field]
            if "times_ours" in row:  # whole jobs are timed in turn
                row["times_ours"] = row.get("times_first", row["times_ours"])
            found.append(row)
    return found
