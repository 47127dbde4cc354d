"""The verdicts of `gpu_check.py` as Markdown that is also readable as it is."""

from __future__ import annotations

from typing import Any

from report_text import commit, hardware, number, percent, shape, software, table

HEADER = ["op", "shape", "ms", "floor ms", "% of floor", "target", "verdict"]
SCORING_HEADER = [
    "provider", "ms/sequence", "tokens/s", "TFLOP/s", "% of products", "x reference",
    "extra GB", "planned/measured", "error of l1 (allowed)", "rank corr.", "targets",
]  # fmt: skip
STREAMED_HEADER = [
    "weights from", "tokens a pass", "layers", "s a pass", "forward", "head", "backward",
    "tokens/s", "TFLOP/s", "% of products", "target", "GB/s of a layer", "peak GB",
    "planned/measured", "error of l1 (allowed)",
]  # fmt: skip


def report(result: dict[str, Any]) -> str:
    device = "rehearsal, numbers mean nothing" if result["rehearsal"] else hardware(result)
    lines = [
        f"# {device}",
        "",
        f"{result['date']}, {commit(result)}, kernels {result['kernels_sha256'][:12]}",
        software(result),
        "",
    ]
    for name, phase in result["phases"].items():
        lines.append(f"- {name}: {phase['error'] or 'ok'} ({phase['seconds']:.0f} s)")
    counts = result.get("correctness")
    if counts:
        lines.append(
            f"- tests: {counts['passed']} passed, {counts['failed']} failed, "
            f"{counts['skipped']} skipped"
        )
        lines += [f"  - {text}" for text in (*counts["failures"][:10], *counts["skips"][:3])]
    for found in result["ceilings"]:
        lines.append(
            f"- {found['dtype']}: copy {found['copy_gb_per_s']:.0f} GB/s read and written, "
            f"product {found['product_gflop_per_s'] / 1e3:.0f} TFLOP/s"
        )
    judged = [row for row in result["rows"] if "verdict" in row]
    if judged:
        lines += ["", *table([HEADER, *map(_cells, judged)], 2)]
    late = sum(row.get("skipped") == "out of time" for row in result["rows"])
    lines += ["", f"{late} rows had no time left."] if late else []
    lines += _scoring(result["scoring"]) if "scoring" in result else []
    lines += _streamed(result["streamed"]) if "streamed" in result else []
    for name, found in result.get("tune", {}).items():
        lines += ["", f"{name}, best first (* is in use):", ""]
        timed = [r for r in found if "median_ms" in r]
        rows = [
            [f"{'*' if r['current'] else ''}{i}", *map(str, r["config"].values()),
             f"{r['median_ms']:.3f}"]
            for i, r in enumerate(timed, 1)
            if i <= 8 or r["current"]
        ]  # fmt: skip
        lines += table([["", *found[0]["config"], "median ms"], *rows])
        lines.append(f"\n{len(found) - len(timed)} of {len(found)} not timed")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["op"], shape(row), number(row["ms"]), number(row["floor_ms"]),
        percent(row["percent_of_floor"]), percent(row["target_percent"]), row["verdict"],
    ]  # fmt: skip


def _scoring(found: dict[str, Any]) -> list[str]:
    rows = [row for row in found["rows"] if "times_ms" in row]
    lines = ["", *_beyond(found)]
    if rows:
        lines += [
            f"An 8B model scored, {found['sequences']} sequences of {found['seq_len']} tokens, "
            f"{found['attention']} attention, {found['backend']} kernels; bf16 products meanwhile: "
            f"{found['gemm_tflops']:.0f} TFLOP/s. FLOPs are 4 a token and weight, for every "
            "provider.",
            "",
        ]
        lines += table([SCORING_HEADER, *map(_scoring_cells, rows)])
    return lines


def _scoring_cells(row: dict[str, Any]) -> list[str]:
    rank = row.get("rank_correlation")
    return [
        row["provider"], f"{row['ms_per_sequence']:.2f}", f"{row['tokens_per_s']:.0f}",
        f"{row['tflops']:.0f}", f"{row['percent_of_gemm']:.1f}", f"{row['times_reference']:.2f}",
        f"{row['extra_gb']:.2f}", number(row["planned_ratio"]),
        f"{row['error']:.1e} ({row['error_allowed']:.1e})", "" if rank is None else f"{rank:.5f}",
        "; ".join([row["verdict"], *row["missed"]]) if "verdict" in row else "",
    ]  # fmt: skip


def _streamed(found: dict[str, Any]) -> list[str]:
    lines = ["", *_beyond(found)]
    if found["rows"]:
        shape = found["model"]
        lines += [
            f"Layers of a 70B model (D {shape['hidden']}, F {shape['width']}) streamed, "
            f"{found['seq_len']} tokens a sequence, a checkpoint of "
            f"{found['checkpoint_bytes'] / 1e9:.1f} GB on {found['filesystem']}, written at "
            f"{found['written_gb_per_s']:.1f} GB/s; bf16 products: {found['gemm_tflops']:.0f} "
            "TFLOP/s. FLOPs are those executed. The first pass reads the files from the disk and "
            "is not counted; the others find them in the system's cache, where a whole 70B's are "
            "only if the host has more memory than their 141 GB.",
            "",
        ]
        cells = [line for row in found["rows"] for line in _streamed_cells(row)]
        lines += table([STREAMED_HEADER, *cells])
        first = [
            f"{row['provider']} {row['passes'][0]['s']:.1f} s"
            for row in found["rows"]
            if row["pass_tokens"] == found["rows"][0]["pass_tokens"]
        ]
        lines += ["", f"First passes, files on the disk: {', '.join(first)}."]
    return lines


def _streamed_cells(row: dict[str, Any]) -> list[list[str]]:
    """A line as measured, and one of the whole model's layers, which says that it was not."""
    whole = row["extrapolated"]
    measured = [
        row["provider"], str(row["pass_tokens"]), str(row["layers"]), f"{row['s']:.2f}",
        f"{row['forward_s']:.2f}", f"{row['head_s']:.2f}", f"{row['backward_s']:.2f}",
        *_rates(row), f"{row['target_percent']:.0f}: {row['verdict']}",
        f"{row['layer_gb_per_s']:.1f}", f"{row['peak_bytes'] / 1e9:.1f}",
        number(row["planned_ratio"]), f"{row['error']:.1e} ({row['error_allowed']:.1e})",
    ]  # fmt: skip
    extrapolated = [
        row["provider"], str(row["pass_tokens"]), f"{whole['layers']}, extrapolated",
        f"{whole['s']:.2f}", "", "", "", *_rates(whole), "", "", "", "", "",
    ]  # fmt: skip
    return [measured, extrapolated]


def _rates(run: dict[str, Any]) -> list[str]:
    return [f"{run['tokens_per_s']:.0f}", f"{run['tflops']:.0f}", f"{run['percent_of_gemm']:.1f}"]


def _beyond(found: dict[str, Any]) -> list[str]:
    """What was left out, and what went wrong."""
    lines = [f"- skipped: {text}" for text in found["skipped"]]
    lines += [f"- error: {text}" for text in found["errors"]]
    return [*lines, ""] if lines else []
