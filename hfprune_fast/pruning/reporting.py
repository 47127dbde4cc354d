"""The report of a pruned checkpoint: checked before the work, written as one file after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune_fast.checkpoint.atomic import check_file, write_whole
from hfprune_fast.checkpoint.ours import begins_with, check_not_read, real
from hfprune_fast.engine.run_log import RunLog, peak_bytes
from hfprune_fast.errors import ScoresFileError
from hfprune_fast.evaluation.changes import ChangedToken
from hfprune_fast.models.sites import SiteKey
from hfprune_fast.pruning.model_card import loading_text, made_rows, training_text
from hfprune_fast.pruning.record import RECORD, read_record
from hfprune_fast.report.facts import Facts, Measurement, read_facts, record_errors, recorded_keep
from hfprune_fast.report.page import START, Report, page
from hfprune_fast.report.pictures import check_matplotlib
from hfprune_fast.scoring.table import ImportanceTable

_OTHERS = "these scores are not the ones this model was pruned with; pass that scores file"
_UNITS = {"obs": "cost of removal, nats", "act": "activation norm"}


def check_report(path: Path, read: Sequence[Path], *, force: bool) -> None:
    """Refuse a report that cannot be drawn or written, before any work.

    Args:
        read: files and folders that must not be written to.
    """
    check_matplotlib()
    check_not_read([path], read, "report")
    check_file(path, "report", "an hfprune report", _is_report, force=force)


def _is_report(path: Path) -> bool:
    return begins_with(path, START.encode())


def unmeasured(folder: Path, table: ImportanceTable | None = None) -> Report:
    """Return what is told of a pruned checkpoint by its record, and by the scores if given.

    Raises:
        CheckpointError: the record is damaged.
        ScoresFileError: the scores are not those that the neurons were chosen by.
    """
    record = read_record(folder)
    facts = read_facts(record, folder / RECORD)
    ranked, unit = (None, "") if table is None else _ranked(table, record, facts)
    with record_errors(folder / RECORD):
        return Report(
            name=folder.resolve().name,
            facts=facts,
            loading=loading_text(facts.layout),
            about=_about(record),
            training=escape(training_text(record)),
            ranked=ranked,
            importance_unit=unit,
        )


def write_report(
    path: Path,
    folder: Path,
    *,
    table: ImportanceTable | None = None,
    measurement: Measurement | None = None,
    changed: Sequence[ChangedToken] = (),
    log: RunLog | None = None,
    force: bool = False,
) -> None:
    """Write the report of a pruned checkpoint, from its record and what else is at hand."""
    report = unmeasured(folder, table)
    report = replace(
        report,
        facts=replace(report.facts, measurement=measurement or report.facts.measurement),
        changed=changed,
        seconds=log.seconds if log else {},
        peak_bytes=peak_bytes() if log else {},
    )
    write_whole(real(path), page(report).encode(), lambda there: force and _is_report(there))


def _ranked(
    table: ImportanceTable, record: Mapping[str, Any], facts: Facts
) -> tuple[Tensor | None, str]:
    """Return the importance that the neurons were chosen by, in falling order, and its unit.

    None if the record does not say what that was; ScoresFileError if the scores are others.
    """
    requested = record.get("requested")
    if not isinstance(requested, dict) or not {"select", "criterion"} <= requested.keys():
        return None, ""
    keep = recorded_keep(record)
    statistic = "obs" if requested["select"] == "obs" else requested.get("statistic")
    importance = table.importance(statistic, requested["criterion"])
    if facts.experts is not None:  # a curve a layer is drawn of the layers' own MLPs
        if not all(_would_choose(table, importance, *each) for each in keep.items()):
            raise ScoresFileError(_OTHERS)
        return None, ""
    ranked, order = importance.sort(dim=1, descending=True, stable=True)
    same_sizes = tuple(importance.shape) == (len(facts.widths), max(facts.dense_widths))
    if not same_sizes or not all(
        order[layer, :width].sort().values.tolist() == keep[layer]
        for layer, width in enumerate(facts.widths)
    ):
        raise ScoresFileError(_OTHERS)
    name = statistic or ""
    return ranked, _UNITS.get(name, f"{requested['criterion']} {name}".strip())


def _would_choose(
    table: ImportanceTable, importance: Tensor, site: SiteKey, kept: Sequence[int]
) -> bool:
    """Return whether these are the most important neurons of an MLP or expert.

    An expert that too few tokens chose has no removal costs, and was ranked by another statistic.
    """
    part = table.sites.get(site)
    if part is None:
        return False
    own = importance[part]
    best = own.sort(descending=True, stable=True).indices[: len(kept)].sort().values
    return best.tolist() == list(kept) or not bool(own.any())


def _about(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say how the neurons were chosen, on what, and by which versions."""
    rows, provenance = made_rows(record), record.get("provenance", {})
    named = (("dtype", "scored in"), ("backend", "kernels"), ("seed", "seed"))
    rows += [(label, str(provenance[key])) for key, label in named if key in provenance]
    versions = dict(provenance.get("versions", {"hfprune_fast": record["hfprune_fast"]}))
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return [*rows, ("versions", made_with)]
