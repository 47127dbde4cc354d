"""docs/benchmarks.md: a few rows of the newest result files, with the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fidelity_tables
import pictures
from records import Result, Row, key
from report_text import (
    columns_table,
    commit,
    duration,
    floors,
    grouped,
    hardware,
    own_provider,
    percent,
    provider,
    short_shape,
    size,
    software,
    times,
)

# The first two of these that were measured stand for all shapes of an operation.
MODELS = ("Llama-3.1-8B", "Llama-2-7B", "Qwen2.5-7B", "Qwen3-0.6B")
SECTIONS = {
    "Whole models": ("score", "whole_job"),
    "Kernels": (
        "softmax_entropy", "softmax_entropy_grad", "cross_entropy_grad", "fisher_grad",
        "linear_entropy", "gated_taylor", "taylor_statistics",
    ),
    "Compaction of weights": ("compact_rows", "compact_columns", "prune_checkpoint"),
}  # fmt: skip
COLUMNS = {
    "op": lambda row: f"`{row['op']}`",
    "shape": short_shape,
    "provider": provider,
    "time": lambda row: _beside(duration(row["ms"]), row["times_ours"]) if "ms" in row else _failed(row),
    "% of floor": lambda row: percent(row.get("percent_of_floor")),
    "memory": lambda row: _beside(size(row["peak_bytes"]), row["memory_ours"])
    if "peak_bytes" in row else "",
    "mapped": lambda row: size(row["mapped_bytes"]) if row.get("mapped_bytes") else "",
    "kept alike": lambda row: f"{100 * row['kept_overlap']:.1f} %" if "kept_overlap" in row else "",
}  # fmt: skip
INTRODUCTION = """\
# Benchmarks

This page is written by `python bench/reporting/report.py` from the files in
[bench/results](../bench/results/README.md), and a test fails where they disagree. `make bench`
measures on a CPU in under 10 minutes, `python bench/gpu/gpu_check.py --out DIR` on a GPU, and
`python bench/reporting/compare.py A.json B.json` compares two results.

Every result was checked before it was timed: against fp64, with at most twice the error of plain
torch in the same dtype and what the result's own dtype explains. A time is a median; in brackets
how many times that of ours. The floor is the least that any implementation must do, timed beside
it in the same rounds. Memory is what was taken beside the inputs or, of whole models, beside the
weights that were there before; mapped is what of the checkpoint's files was in memory at a time;
kept alike is the share of the kept neurons that both keep. Those marked (cross entropy) compute the
cross entropy of given labels, not the entropy, on the same shapes."""


@dataclass(frozen=True)
class Source:
    """A committed result file."""

    path: Path
    result: Result
    suffix: str

    @property
    def machine(self) -> str:
        return str(self.result["machine"]["name"])

    @property
    def device(self) -> str:
        return str(self.result["machine"]["device"])


def path(root: Path) -> Path:
    return root / "docs" / "benchmarks.md"


def markdown(root: Path, current: list[Source], models: list[fidelity_tables.Measured]) -> str:
    lines = [INTRODUCTION]
    for title, ops in SECTIONS.items():
        lines += ["", f"## {title}"]
        for source in current:
            lines += _section(root, source, ops)
        measured = {s.device for s in current if any(row["op"] in ops for row in s.result["rows"])}
        for device, word in (("cpu", "CPU"), ("cuda", "GPU")):
            if device not in measured and "compact_rows" not in ops:
                lines += ["", f"Not measured on a {word} yet."]
    drawn = pictures.planned(root, current, models).items()
    images = {at: f"![{picture.alt}]({_link(root, at)})" for at, picture in drawn}
    fidelity = fidelity_tables.picture_path(root)
    others = [text for at, text in images.items() if at != fidelity]
    lines += ["", "## Pictures", "", "\n\n".join(others or ["Nothing was measured yet."])]
    lines += ["", "## Fidelity", "", *fidelity_tables.section(models, lambda at: _link(root, at))]
    return "\n".join(lines + (["", images[fidelity]] if fidelity in images else [])) + "\n"


def _link(root: Path, at: Path) -> str:
    return Path(os.path.relpath(at, root / "docs")).as_posix()


def _section(root: Path, source: Source, ops: tuple[str, ...]) -> list[str]:
    own = own_provider(source.device)
    rows = [
        row for op in ops for row in _shown([r for r in source.result["rows"] if r["op"] == op])
    ]
    if not rows:
        return []
    date, result = str(source.result["date"])[:10], source.result
    names = ("torch",) if source.device == "cpu" else ("torch", "triton")
    lines = [
        "",
        f"{hardware(result)}, {software(result, names)}, {date}, {commit(result)}. {floors(rows)} "
        f"[All rows]({_link(root, source.path.with_suffix('.md'))}).",
        "",
        *columns_table(
            _beside_ours([row for row in rows if "skipped" not in row], own), COLUMNS, 3
        ),
    ]
    skipped = grouped((row for row in rows if "skipped" in row), lambda row: str(row["skipped"]))
    told = [
        f"{', '.join(grouped(its, lambda row: str(row['provider'])))} ({reason})"
        for reason, its in skipped.items()
    ]
    return lines + (["", f"Skipped: {'; '.join(told)}."] if told else [])


def _shown(rows: list[Row]) -> list[Row]:
    """Return the rows of an operation that the page has.

    Of models' shapes two, in bfloat16 if there are any; of a series of models the largest.
    """
    groups = [
        its
        for its in grouped(rows, _group).values()
        if its[0].get("sweep") in (None, "model") and any("skipped" not in row for row in its)
    ]
    series = [its[0]["sizes"]["params"] for its in groups if its[0].get("sweep")]
    shown = [its for its in groups if not its[0]["model"]]
    shown = [i for i in shown if not i[0].get("sweep") or i[0]["sizes"]["params"] == max(series)]
    named = [its for its in groups if its[0]["model"]]
    dtypes = {its[0]["dtype"] for its in named}
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    named = [its for its in named if its[0]["dtype"] == dtype]
    order = {name: i for i, name in enumerate(MODELS)}
    named.sort(key=lambda its: order.get(its[0]["model"], len(order)))
    return [row for its in (*named[:2], *shown) for row in its]


def _group(row: Row) -> str:
    return str(key({**row, "provider": ""}))


def _beside_ours(rows: list[Row], own: str) -> Iterator[Row]:
    """Yield the rows with how many times ours they take, of each shape."""
    for its in grouped(rows, _group).values():
        mine = [row for row in its if row["provider"].startswith("ours") and "ms" in row]
        ours = next((row for row in mine if row["provider"] == own), mine[0] if mine else {})
        for row in its:
            beside = {
                name: row[field] / ours[field]
                if row is not ours and row.get(field) and ours.get(field) else None
                for name, field in (("times_ours", "ms"), ("memory_ours", "peak_bytes"))
            }  # fmt: skip
            if "times_first" in row and beside["times_ours"]:
                beside["times_ours"] = row["times_first"]  # whole jobs are timed in turn
            yield row | beside


def _beside(text: str, ratio: float | None) -> str:
    return text + (f" ({times(ratio)})" if ratio else "")


def _failed(row: Row) -> str:
    return "out of memory" if "out of memory" in row["failed"] else "failed"
