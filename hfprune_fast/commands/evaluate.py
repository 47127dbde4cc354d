"""hfprune evaluate: a pruned checkpoint against its dense one, over a text, by tasks, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.folder import read_json_object
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions, RunOptions, TaskOptions
from hfprune_fast.console import say, text_table, token_bar
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.data.sources import STDIN
from hfprune_fast.engine.planner import plan_run
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import ArgumentError, CheckpointError
from hfprune_fast.evaluation.fidelity import Fidelity, check_vocabularies, check_windows, compare
from hfprune_fast.evaluation.harness import blueprints_for_tasks, run_tasks
from hfprune_fast.evaluation.tasks import load_tasks
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.on_disk import RECORD

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
    sources = [open_source(dense), open_source(pruned)]
    result: dict[str, Any] = {}
    if which.tasks is not None:
        blueprints = blueprints_for_tasks(sources, options, sampling.seq_len)
        loaded = load_tasks(which)
    if text_source is not None:
        result = asdict(_fidelity(sources, text_source, sampling, options, progress))
    if which.tasks is not None:
        rows = run_tasks(
            blueprints, loaded, which.limit, options.batch_size, sampling.seq_len, progress
        )
        result["tasks"] = [asdict(row) for row in rows]
    return result


def _fidelity(
    sources: Sequence[ModelSource],
    text_source: str | Path,
    sampling: CalibrationOptions,
    options: RunOptions,
    progress: bool,
) -> Fidelity:
    """Compare two checkpoints over a text; over all of it, in order, if samples is None.

    One model is in memory at a time (or a layer of it), with the dense one's final hidden states.
    """
    data = calibrate(text_source, sources[0], sampling, evaluation=True)
    check_windows(data.batches)
    check_vocabularies(*(source.spec.vocab_size for source in sources))
    _warn_of_calibration_text(sources[1], data)
    blueprints = [
        loading.blueprint(
            source, dtype=options.dtype, device=options.device, attention=options.attention
        )
        for source in sources
    ]
    plan = plan_run(
        sources[0].spec,
        options,
        device=blueprints[0].device,
        dtype=blueprints[0].dtype,
        seq_len=data.longest,
        sequences=data.sequences,
    )
    batches = data.split(plan.batch_size)
    with token_bar("evaluating", 2 * data.tokens, progress) as on_progress:
        with open_model(blueprints[0], plan.offload) as model:
            hidden = [h.to("cpu") for h in model.final_hidden(batches, on_progress)]
            head = model.head()
        del model, blueprints[0]
        with open_model(blueprints[0], plan.offload) as model:
            return compare(
                batches, hidden, model.final_hidden(batches, on_progress), head, model.head()
            )


def _warn_of_calibration_text(pruned: ModelSource, data: TokenData) -> None:
    """Say if the pruned model was calibrated on this text, by its name or its tokens."""
    name = data.description["source"]
    try:
        known = read_json_object(pruned.folder / RECORD)["provenance"]["calibration"]
        is_same = known["source"] == name != STDIN or known["data_sha256"] == data.sha256
    except (CheckpointError, KeyError, TypeError):
        return  # no record, or one of another kind
    if is_same:
        say(f"{name} calibrated the pruned model, which flatters it; use held-out text")


def text(result: dict[str, Any]) -> str:
    """Return what `run` found as people read it."""
    parts = []
    if "kl_nats" in result:
        parts.append(
            "KL(dense || pruned)  {kl_nats:.4f} nats\n"
            "perplexity           {ppl_dense:.3f} dense, {ppl_pruned:.3f} pruned\n"
            "top-1 agreement      {top1_agreement:.2%}\n"
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
