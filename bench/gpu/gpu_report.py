"""The verdicts of `gpu_check.py` as Markdown that is also readable as text."""

from __future__ import annotations

import report_text as text
from records import Result, Row

LEFT_OUT = ("quartiles", "rounds", "GB/s", "GFLOP/s", "times the first's")


def report(result: Result) -> str:
    device = "rehearsal, numbers mean nothing" if result["rehearsal"] else text.hardware(result)
    commit, kernels = text.commit(result), result["kernels_sha256"][:12]
    lines = [f"# {device}", "", f"{result['date']}, {commit}, kernels {kernels}"]
    lines += [text.software(result), ""]
    for name, phase in result["phases"].items():
        lines.append(f"- {name}: {phase['error'] or 'ok'} ({phase['seconds']:.0f} s)")
        lines += [f"  - skipped: {reason}" for reason in phase.get("skipped", ())]
    if counts := result.get("correctness"):
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
        lines += [f"- tests: {told}"]
        lines += [f"  - {line}" for line in (*counts["failures"][:10], *counts["skips"][:3])]
    lines += [
        f"- {found['dtype']}: copy {found['copy_gb_per_s']:.0f} GB/s read and written, "
        f"product {found['product_gflop_per_s'] / 1e3:.0f} TFLOP/s"
        for found in result["ceilings"]
    ]
    shown = ("score", "refit", "removal_costs", "cross_entropy_grad", "fisher_grad")
    rows = [r for r in result["rows"] if "ms" in r and ("verdict" in r or r["op"] in shown)]
    names = [name for name in text.COLUMNS if name not in LEFT_OUT]
    lines += ["", *text.rows_table(rows, names)] if rows else []
    late = sum(row.get("skipped") == "out of time" for row in result["rows"])
    lines += ["", f"{late} rows had no time left."] if late else []
    for name, found in result["phases"].get("tune", {}).get("tuned", {}).items():
        lines += ["", f"{name}, best first (* is in use):", "", *_tuned(found)]
    return "\n".join(lines) + "\n"


def _tuned(found: list[Row]) -> list[str]:
    timed = [row for row in found if "median_ms" in row]
    rows = [["", *found[0]["config"], "median ms"]]
    for i, row in enumerate(timed, 1):
        if i <= 8 or row["current"]:
            mark = f"{'*' if row['current'] else ''}{i}"
            rows.append([mark, *map(str, row["config"].values()), f"{row['median_ms']:.3f}"])
    return [*text.table(rows), "", f"{len(found) - len(timed)} of {len(found)} not timed"]
