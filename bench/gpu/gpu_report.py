"""The verdicts of `gpu_check.py` as Markdown that is also readable as text."""

from __future__ import annotations

import report_text as text
from records import Result

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
    return "\n".join(lines) + "\n"
