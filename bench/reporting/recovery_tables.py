"""The tables of what `bench/recovery/recovery.py` measured, for docs/recovery.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from records import ResultError
from report_text import duration, number, size, table, under

WAYS = {
    "pruned": "pruned",
    "reconstructed": "reconstructed",
    "kl": "recovered by KL",
    "ce": "recovered by cross entropy",
}
_HEADING = "## What was measured\n"
HINT = "[All numbers, and zero-shot tasks](recovery.md#what-was-measured)."
_COLUMNS = ["removed", "", "KL, nats", "perplexity", "top-1", "CPU time", "memory"]

RecoveryRow = dict[str, Any]


def path(root: Path) -> Path:
    return root / "docs" / "recovery.md"


def picture_path(root: Path) -> Path:
    return root / "bench" / "results" / "recovery" / "recovery.svg"


def all_of(root: Path) -> dict[str, list[RecoveryRow]]:
    """Return the rows of each model, by its name: ratios in order, and the ways of each."""
    found = {}
    for file in sorted(picture_path(root).parent.glob("*.jsonl")):
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            rows.sort(key=lambda row: (row["ratio"], row["tokens"], list(WAYS).index(row["way"])))
        except (ValueError, KeyError) as error:
            raise ResultError(f"{file}: damaged ({error})") from error
        found[file.stem] = rows
    return found


def way(row: RecoveryRow) -> str:
    """Return how a model came about, in words."""
    words = WAYS[row["way"]]
    return f"{words}, {row['tokens'] / 1e6:.1f} M tokens" if row["tokens"] else words


def page(text: str, models: dict[str, list[RecoveryRow]], picture: str) -> str:
    """Return docs/recovery.md with the tables under their heading."""
    lines = [line for name, rows in models.items() for line in [*section(name, rows), ""]]
    return under(text, _HEADING, "\n".join(["", *lines, picture, ""]))


def section(name: str, rows: list[RecoveryRow]) -> list[str]:
    first = rows[0]
    caption = (
        f"{name}, on {first['held_out_tokens']:,} held-out tokens; the dense perplexity is "
        f"{first['ppl_dense']:.2f}:"
    )
    cells = [_COLUMNS]
    for row in rows:
        cells.append(
            [
                f"{row['ratio']:.0%}", way(row), number(row["kl_nats"]),
                f"{row['ppl_pruned']:.2f}", f"{row['top1_agreement']:.1%}",
                duration(row["cpu_seconds"] * 1e3) if "cpu_seconds" in row else "",
                size(row.get("peak_bytes")),
            ]
        )  # fmt: skip
    with_tasks = [row for row in rows if row.get("tasks")]
    return [caption, "", *table(cells, 2), *(["", *_tasks(with_tasks)] if with_tasks else [])]


def _tasks(rows: list[RecoveryRow]) -> list[str]:
    """Return what zero-shot tasks gave: the dense model's values, then each way's difference."""
    metrics = [(found["task"], found["metric"]) for found in rows[0]["tasks"]]
    cells = [["removed", "", *(f"{task}, {metric}" for task, metric in metrics)]]
    dense = [_value(found, "dense") for found in rows[0]["tasks"]]
    cells.append(["", "dense", *dense])
    for row in rows:
        by_name = {(found["task"], found["metric"]): found for found in row["tasks"]}
        values = [_value(by_name[name], "difference") for name in metrics]
        cells.append([f"{row['ratio']:.0%}", way(row), *values])
    return table(cells, 2)


def _value(found: dict[str, Any], column: str) -> str:
    value, error = found[column], found[f"{column}_stderr"]
    sign = "+" if column == "difference" else ""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")
