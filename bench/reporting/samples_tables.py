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
    if any(_other_lengths(model) for model in models):
        lines[0] += (
            " Below, as many tokens as the most windows have, in windows of other lengths; those "
            "that are measured on are of the same length as in the table above."
        )
    for model in models:
        header, tokens = model.header, model.rows[0]["tokens"]
        caption = (
            f"{named(model)}: windows of {header['calibration']['seq_len']} tokens of "
            f"{header['texts'][0]}, seeds {model.seeds}; {tokens} tokens of {header['texts'][1]}. "
            f"{model.runs}."
        )
        cells = [["removed", "windows", "tokens a kept neuron", *COLUMNS]]
        usual = header["calibration"]["seq_len"]
        for ratio in model.ratios:
            groups = _groups(model, ratio, usual)
            for count, its in sorted(groups.items()):
                a_neuron = f"{count * usual / mean(its[0]['widths']):.0f}"
                cells.append([f"{ratio:.0%}", str(count), a_neuron, *_cells(its)])
        lines += ["", caption, "", *table(cells, 2)]
        if lengths := _other_lengths(model):
            cells = [["removed", "tokens a window", "windows", *COLUMNS]]
            for ratio in model.ratios:
                for length in sorted([*lengths, usual]):
                    groups = _groups(model, ratio, length)
                    if groups:
                        count = max(groups)
                        ends = f"{ratio:.0%}", str(length), str(count)
                        cells.append([*ends, *_cells(groups[count])])
            lines += ["", *table(cells, 3)]
    return lines


def _length(model: Measured, row: Row) -> int:
    """Return the tokens of a row's windows."""
    return int(row.get("seq_len", model.header["calibration"]["seq_len"]))


def _other_lengths(model: Measured) -> set[int]:
    usual = model.header["calibration"]["seq_len"]
    return {_length(model, row) for row in model.rows} - {usual}


def _groups(model: Measured, ratio: float, length: int) -> dict[int, list[Row]]:
    """Return the rows of a ratio and a length of windows, by the number of windows."""
    groups: dict[int, list[Row]] = {}
    for row in model.rows:
        if row["prune_ratio"] == ratio and _length(model, row) == length:
            groups.setdefault(row["samples"], []).append(row)
    return groups


def _cells(rows: list[Row]) -> list[str]:
    return [
        span((row["kl_nats"] for row in rows), number),
        span((row["kept_overlap"] for row in rows), "{:.1%}".format),
        span((row["score_regret"] for row in rows), "{:+.1%}".format),
        span((row["squared_error"] for row in rows), "{:.2%}".format),
        span((row["cpu_seconds"] for row in rows), number),
    ]
