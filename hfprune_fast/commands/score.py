"""hfprune score: every statistic of every neuron, into a scores file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint.atomic import check_file
from hfprune_fast.checkpoint.ours import SCORES, check_not_read, is_ours, real
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.engine.distributed import launched
from hfprune_fast.models.size_text import widths_text
from hfprune_fast.scoring.resume import check_state, delete_state, state_of
from hfprune_fast.scoring.score import score
from hfprune_fast.scoring.table import saved_on_failure


def run(
    model: str | Path,
    calibration: str,
    out: Path,
    *,
    criterion: Sequence[str],
    obs: bool,
    force: bool,
    **options: Any,
) -> dict[str, Any]:
    """Score a model into a file; empty in the processes of torchrun but the first."""
    source = open_source(model)
    check_not_read([out, state_of(out)], [source.folder, Path(calibration)])
    check_file(out, "out", "an hfprune scores file", _is_scores, force=force)
    check_state(out, resume=options.get("resume", False), force=force)
    table = score(
        source,
        calibration,
        criterion=criterion,
        obs=obs,
        state_file=state_of(out),
        distributed=True,
        progress=True,
        **options,
    )
    if launched().rank > 0:
        return {}
    with saved_on_failure(table, out):
        table.save(real(out), lambda path: force and _is_scores(path))
    delete_state(out)
    return {"out": str(out), **asdict(table.model), "provenance": table.provenance}


def text(result: dict[str, Any], model: str, calibration: str, flags: Mapping[str, Any]) -> str:
    """Return what `run` did with these flags as human-readable text."""
    layers, width = result["num_layers"], result["intermediate_size"]
    widths = f"{widths_text(result['mlp_widths'] or [width])} neurons"
    if result["experts"]:
        number, each = max(result["experts"]), result["expert_width"]
        own = f" and MLPs of {widths}" if any(result["mlp_widths"] or [width]) else ""
        widths = f"{number} experts of {each} neurons{own}"
    scored = (
        f"{result['out']}: {layers} layers x {widths} scored on "
        f"{result['provenance']['tokens']} tokens"
    )
    budget = "--expert-ratio 0.25" if result["experts"] else "--prune-ratio 0.2"
    sampling = "".join(
        f" --{each.name.replace('_', '-')}"
        + ("" if flags[each.name] is True else f" {flags[each.name]}")
        for each in fields(CalibrationOptions)
        if flags[each.name] != each.default
    )
    return (
        f"{scored}\nnext: hfprune prune {model} --scores {result['out']} --calibration "
        f"{calibration}{sampling} {budget} --out DIR"
    )


def _is_scores(path: Path) -> bool:
    return is_ours(path, SCORES)
