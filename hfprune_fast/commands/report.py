"""hfprune report: one page with pictures of a pruned checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint.folder import find_model
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions, RunOptions
from hfprune_fast.errors import ArgumentError
from hfprune_fast.evaluation.changes import ChangedToken
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.checkpoint_fidelity import held_out_windows, measure
from hfprune_fast.pruning.reporting import check_report, unmeasured, write_report
from hfprune_fast.scoring.table import ImportanceTable


@keyword_options(sampling=CalibrationOptions, options=RunOptions)
def run(
    pruned: str | Path,
    out: Path,
    *,
    scores: Path | None = None,
    dense: str | None = None,
    text: str | None = None,
    force: bool = False,
    progress: bool = False,
    sampling: CalibrationOptions,
    options: RunOptions,
) -> dict[str, Any]:
    """Write a report of what hfprune.json holds; of the scores and a measurement if given."""
    if (dense is None) != (text is None):
        raise ArgumentError("--dense MODEL and --text SOURCE go together: one is compared over it")
    folder = find_model(pruned)
    read = [Path(name) for name in (scores, dense, text) if name and Path(name).exists()]
    check_report(out, [folder, *read], force=force)
    table = None if scores is None else ImportanceTable.load(scores)
    facts = unmeasured(folder, table).facts
    measurement, changed = facts.measurement, list[ChangedToken]()
    if dense is not None and text is not None:
        source = open_source(dense)
        if source.spec.total_params != facts.dense_params:
            raise ArgumentError(
                f"{pruned} was made of a model of {facts.dense_params:,} parameters "
                f"({facts.base_model}), and {dense} has {source.spec.total_params:,}"
            )
        data = held_out_windows(text, source, sampling)
        measurement, changed = measure(source, folder, data, options, progress)
    write_report(out, folder, table=table, measurement=measurement, changed=changed, force=force)
    return {"out": str(out), "fidelity": asdict(measurement.fidelity) if measurement else None}


def text(result: dict[str, Any]) -> str:
    """Return what `run` did as human-readable text."""
    return f"{result['out']}: open it in a browser; it is one file and needs no network"
