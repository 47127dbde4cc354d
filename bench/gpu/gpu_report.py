"""The verdicts of `gpu_check.py` as Markdown that is also readable as text."""

from __future__ import annotations

from records import Result, Row
from report_text import (
    columns_table,
    commit,
    duration,
    hardware,
    number,
    percent,
    shape,
    size,
    software,
    table,
    times,
)

COLUMNS = {
    "op": lambda row: row["op"],
    "shape": shape,
    "provider": lambda row: row["provider"],
    "time": lambda row: duration(row["ms"]),
    "% of floor": lambda row: percent(row.get("percent_of_floor")),
    "target": lambda row: percent(row.get("target_percent")),
    "executed, % of products": lambda row: percent(row.get("executed_percent")),
    "reference": lambda row: times(row.get("times_reference")),
    "memory": lambda row: size(row["peak_bytes"]),
    "planned/measured": lambda row: number(row.get("planned_ratio")),
    "whole model, extrapolated": lambda row: "".join(
        f"{layers} layers: {number(s)} s" for layers, s in row.get("extrapolated_s", {}).items()
    ),
    "error (allowed)": lambda row: f"{row['error']:.1e} ({row['error_allowed']:.1e})"
    if "error" in row else "",
    "verdict": lambda row: row.get("verdict", ""),
}  # fmt: skip


def report(result: Result) -> str:
    device = "rehearsal, numbers mean nothing" if result["rehearsal"] else hardware(result)
    kernels = result["kernels_sha256"][:12]
    lines = [f"# {device}", "", f"{result['date']}, {commit(result)}, kernels {kernels}"]
    lines += [software(result), ""]
    for name, phase in result["phases"].items():
        lines.append(f"- {name}: {phase['error'] or 'ok'} ({phase['seconds']:.0f} s)")
        lines += [f"  - skipped: {text}" for text in phase.get("skipped", ())]
    if counts := result.get("correctness"):
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
        lines += [f"- tests: {told}"]
        lines += [f"  - {text}" for text in (*counts["failures"][:10], *counts["skips"][:3])]
    lines += [
        f"- {found['dtype']}: copy {found['copy_gb_per_s']:.0f} GB/s read and written, "
        f"product {found['product_gflop_per_s'] / 1e3:.0f} TFLOP/s"
        for found in result["ceilings"]
    ]
    ops = ("score", "refit", "removal_costs")
    rows = [row for row in result["rows"] if "ms" in row and ("verdict" in row or row["op"] in ops)]
    lines += ["", *columns_table(rows, COLUMNS, 3)] if rows else []
    late = sum(row.get("skipped") == "out of time" for row in result["rows"])
    lines += ["", f"{late} rows had no time left."] if late else []
    for name, found in result["phases"].get("tune", {}).get("tuned", {}).items():
        lines += ["", f"{name}, best first (* is in use):", "", *_tuned(found)]
    return "\n".join(lines) + "\n"


def _tuned(found: list[Row]) -> list[str]:
    timed = [row for row in found if "median_ms" in row]
    rows = [
        [f"{'*' if row['current'] else ''}{i}", *map(str, row["config"].values()),
         f"{row['median_ms']:.3f}"]
        for i, row in enumerate(timed, 1)
        if i <= 8 or row["current"]
    ]  # fmt: skip
    left = f"{len(found) - len(timed)} of {len(found)} not timed"
    return [*table([["", *found[0]["config"], "median ms"], *rows]), "", left]
