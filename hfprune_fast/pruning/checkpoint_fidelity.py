"""The fidelity of a pruned checkpoint on held-out text."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions, RunOptions
from hfprune_fast.console import say
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.data.sources import STDIN
from hfprune_fast.errors import CheckpointError
from hfprune_fast.evaluation.changes import ChangedToken, TokenChanges, changed_tokens
from hfprune_fast.evaluation.checkpoints import compare_checkpoints
from hfprune_fast.evaluation.fidelity import check_windows
from hfprune_fast.pruning.record import read_record
from hfprune_fast.report.facts import Measurement


def held_out_windows(
    text: str | Path, source: ModelSource, sampling: CalibrationOptions
) -> TokenData:
    """Return windows of a held-out text; refuse those of one token, which predict none."""
    data = calibrate(text, source, sampling, evaluation=True)
    check_windows(data.batches)
    return data


def measure(
    dense: ModelSource, folder: Path, data: TokenData, run: RunOptions, progress: bool = False
) -> tuple[Measurement, list[ChangedToken]]:
    """Return the fidelity of a pruned checkpoint on held-out text, and what changed most in it."""
    pruned, changes = open_source(folder), TokenChanges()
    warn_of_calibration_text(pruned, data)
    fidelity = compare_checkpoints(dense, pruned, data, run, changes=changes, progress=progress)
    name, bins = str(data.description["source"]), tuple(changes.by_position())
    try:
        tokenizer = dense.tokenizer
    except CheckpointError:  # none, and the text is a file of token ids
        tokenizer = None
    changed = changed_tokens(changes.largest, data, tokenizer)
    return Measurement(name, fidelity, bins), changed


def warn_of_calibration_text(pruned: ModelSource, data: TokenData) -> None:
    """Say if the pruned model was calibrated or trained on this text, by its name or its tokens."""
    name = data.description["source"]
    try:
        record = read_record(pruned.folder)
    except CheckpointError:
        return
    was = ""
    with suppress(KeyError, TypeError):  # of another kind
        known = record["provenance"]["calibration"]
        if known["source"] == name != STDIN or known["data_sha256"] == data.sha256:
            was = "calibration text"
    with suppress(KeyError, TypeError):
        if record["recovery"]["text"] == name != STDIN:
            was = "text that it was trained on"
    if was:
        say(f"{name} was also the {was}, so these numbers are optimistic; use held-out text")
