"""A pruned checkpoint measured on held-out text, and the result put into its record and card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions, RunOptions
from hfprune_fast.console import say
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.data.sources import STDIN
from hfprune_fast.errors import CheckpointError
from hfprune_fast.evaluation.changes import TokenChanges
from hfprune_fast.evaluation.checkpoints import compare_checkpoints
from hfprune_fast.evaluation.fidelity import check_windows
from hfprune_fast.pruning.on_disk import read_record
from hfprune_fast.report.facts import Measurement
from hfprune_fast.report.tokens import ChangedToken, changed_tokens


@dataclass(frozen=True)
class Measured:
    """Fidelity on a text, and the positions at which the model changed most."""

    measurement: Measurement
    changed: list[ChangedToken]


def held_out(text: str, source: ModelSource, sampling: CalibrationOptions) -> TokenData:
    """Return all windows of a held-out text, in order, as `hfprune evaluate` reads it."""
    data = calibrate(text, source, replace(sampling, samples=None), evaluation=True)
    check_windows(data.batches)
    return data


def measure(
    dense: ModelSource, folder: Path, data: TokenData, run: RunOptions, progress: bool = False
) -> Measured:
    """Compare a pruned checkpoint with its dense one over held-out windows."""
    pruned, changes = open_source(folder), TokenChanges()
    warn_of_calibration_text(pruned, data)
    fidelity = compare_checkpoints(dense, pruned, data, run, changes=changes, progress=progress)
    name, bins = str(data.description["source"]), tuple(changes.by_position())
    try:
        tokenizer = dense.tokenizer
    except CheckpointError:  # none, and the text is a file of token ids
        tokenizer = None
    changed = changed_tokens(changes.largest, data, tokenizer)
    return Measured(Measurement(name, fidelity, bins), changed)


def warn_of_calibration_text(pruned: ModelSource, data: TokenData) -> None:
    """Say if the pruned model was calibrated on this text, by its name or its tokens."""
    name = data.description["source"]
    try:
        known = read_record(pruned.folder)["provenance"]["calibration"]
        is_same = known["source"] == name != STDIN or known["data_sha256"] == data.sha256
    except (CheckpointError, KeyError, TypeError):
        return  # no record, or one of another kind
    if is_same:
        say(
            f"{name} was also the calibration text, so these numbers are optimistic; use held-out "
            "text"
        )
