"""The table of what `bench/fidelity/samples.py` measured, for docs/evidence.md.

A file NAME-samples.jsonl in bench/results/fidelity is in the form of NAME.jsonl; `samples.py` says
what its rows have beside.
"""

from __future__ import annotations

from statistics import mean

from fidelity_tables import Measured, named, span
from records import Row
from report_text import number, table

COLUMNS = ("KL, nats", "kept alike", "score regret", "squared error", "CPU s")


def section(models: list[Measured]) -> list[str]:
    """Return a table of each model: a row for each number of windows, a group for each ratio."""
    lines = [
        "The default recipe on the first windows of a seed, beside what it keeps on the most: the "
        "part of the kept neurons that is the same, and the score regret, how much more the "
        "removed ones cost by the scores on the most windows. The squared error is that of the "
        "residual stream on held-out text, relative, mean over the layers; CPU seconds are of "
        "choosing and refitting. Mean over the seeds (lowest–highest)."
    ]
    for model in models:
        header, tokens = model.header, model.rows[0]["tokens"]
        usual = header["calibration"]["seq_len"]
        caption = (
            f"{named(model)}: windows of {usual} tokens of {header['texts'][0]}, seeds "
            f"{model.seeds}; {tokens} tokens of {header['texts'][1]}. {model.runs}."
        )
        groups = _grouped(model)
        cells = [["removed", "windows", "tokens a kept neuron", *COLUMNS]]
        for (ratio, length, count), rows in groups.items():
            if length == usual:
                a_neuron = f"{count * usual / mean(rows[0]['widths']):.0f}"
                cells.append([f"{ratio:.0%}", str(count), a_neuron, *_cells(rows)])
        lines += ["", caption, "", *table(cells, 2)]
        cells = [["removed", "tokens a window", "windows", *COLUMNS]]
        others = {ratio for ratio, length, _ in groups if length != usual}
        most = header["calibration"]["samples"]
        for (ratio, length, count), rows in groups.items():
            if ratio in others and (length != usual or count == most):
                cells.append([f"{ratio:.0%}", str(length), str(count), *_cells(rows)])
        if others:
            lines += ["", f"As many tokens in windows of other lengths, measured on {usual}:", ""]
            lines += table(cells, 3)
    return lines


def _grouped(model: Measured) -> dict[tuple[float, int, int], list[Row]]:
    """Return the rows of each ratio, number of tokens a window and number of windows, in order."""
    usual = model.header["calibration"]["seq_len"]
    groups: dict[tuple[float, int, int], list[Row]] = {}
    for row in model.rows:
        setting = row["prune_ratio"], row.get("seq_len", usual), row["samples"]
        groups.setdefault(setting, []).append(row)
    return dict(sorted(groups.items()))


def _cells(rows: list[Row]) -> list[str]:
    return [
        span((row["kl_nats"] for row in rows), number),
        span((row["kept_overlap"] for row in rows), "{:.1%}".format),
        span((row["score_regret"] for row in rows), "{:+.1%}".format),
        span((row["squared_error"] for row in rows), "{:.2%}".format),
        span((row["cpu_seconds"] for row in rows), number),
    ]
