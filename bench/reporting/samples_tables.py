"""The table of what `bench/fidelity/samples.py` measured, for docs/evidence.md.

A file NAME-samples.jsonl in bench/results/fidelity is in the form of NAME.jsonl; `samples.py` says
what its rows have beside.
"""

from __future__ import annotations

from statistics import mean

from fidelity_tables import Measured, named, span
from records import Row
from report_text import hardware, number, table

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
        caption = (
            f"{named(model)}: windows of {header['calibration']['seq_len']} tokens of "
            f"{header['texts'][0]}, seeds {model.seeds}; {tokens} tokens of {header['texts'][1]}. "
            f"{hardware(header)}, {header['date'][:10]}."
        )
        cells = [["removed", "windows", "tokens a kept neuron", *COLUMNS]]
        for ratio in model.ratios:
            rows = [row for row in model.rows if row["prune_ratio"] == ratio]
            for count in sorted({row["samples"] for row in rows}):
                its = [row for row in rows if row["samples"] == count]
                calibrated = count * header["calibration"]["seq_len"]
                a_neuron = f"{calibrated / mean(its[0]['widths']):.0f}"
                cells.append([f"{ratio:.0%}", str(count), a_neuron, *_cells(its)])
        lines += ["", caption, "", *table(cells, 2)]
    return lines


def _cells(rows: list[Row]) -> list[str]:
    return [
        span((row["kl_nats"] for row in rows), number),
        span((row["kept_overlap"] for row in rows), "{:.1%}".format),
        span((row["score_regret"] for row in rows), "{:+.1%}".format),
        span((row["squared_error"] for row in rows), "{:.2%}".format),
        span((row["cpu_seconds"] for row in rows), number),
    ]
