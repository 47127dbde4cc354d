"""hfprune evaluate: a pruned checkpoint against its dense one, over a text, by tasks, or both."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions, RunOptions, TaskOptions
from hfprune_fast.console import text_table
from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation.checkpoints import compare_checkpoints
from hfprune_fast.evaluation.fidelity import check_vocabularies
from hfprune_fast.evaluation.harness import evaluate_tasks
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.checkpoint_fidelity import held_out_windows, warn_of_calibration_text

_COLUMNS = ("dense", "pruned", "difference")


@keyword_options(sampling=CalibrationOptions, options=RunOptions, which=TaskOptions)
def run(
    dense: str | Path,
    pruned: str | Path,
    text_source: str | Path | None = None,
    *,
    sampling: CalibrationOptions,
    options: RunOptions,
    which: TaskOptions,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare two checkpoints, one in memory at a time.

    Returns:
        The fields of Fidelity, over the text; `tasks`, those of a TaskResult for each metric.
    """
    if text_source is None and which.tasks is None:
        raise ArgumentError("evaluate needs text (--text SOURCE), tasks (--tasks NAMES), or both")
    first, second = open_source(dense), open_source(pruned)
    data = None
    if text_source is not None:  # what can be refused is refused before the tasks run
        check_vocabularies(first.spec.vocab_size, second.spec.vocab_size)
        data = held_out_windows(text_source, first, sampling)
        warn_of_calibration_text(second, data)
    result: dict[str, Any] = {}
    if which.tasks is not None:
        given = {**vars(options), **vars(which), "seq_len": sampling.seq_len}
        rows = evaluate_tasks(first, second, **given, progress=progress)
        result["tasks"] = [asdict(row) for row in rows]
    if data is not None:
        fidelity = compare_checkpoints(first, second, data, options, progress=progress)
        result = asdict(fidelity) | result
    return result


def text(result: dict[str, Any]) -> str:
    """Return what `run` found as human-readable text."""
    parts = []
    if "kl_nats" in result:
        parts.append(
            "KL(dense || pruned)  {kl_nats:.4f} nats\n"
            "perplexity           {ppl_dense:.3f} dense, {ppl_pruned:.3f} pruned\n"
            "top-1 agreement      {top1_agreement:.2%}\n"
            "top-5 agreement      {top5_agreement:.2%}\n"
            "over                 {tokens} tokens".format(**result)
        )
    if "tasks" in result:
        rows = [
            (row["task"], row["metric"], *(_with_error(row, k) for k in _COLUMNS))
            for row in result["tasks"]
        ]
        parts.append(text_table(("task", "metric", *_COLUMNS), rows))
    return "\n\n".join(parts)


def _with_error(row: dict[str, Any], column: str) -> str:
    value = f"{row[column]:+.4f}" if column == "difference" else f"{row[column]:.4f}"
    error = row[f"{column}_stderr"]
    return value if error is None else f"{value} ± {error:.4f}"
