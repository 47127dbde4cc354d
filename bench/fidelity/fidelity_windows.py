"""The windows of a text that a study calibrates with, and those of another that it measures on."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.errors import ArgumentError

# Two windows with as many equal tokens in a row have them from one document.
SHARED_RUN = 48


def windows(
    args: argparse.Namespace,
    source: ModelSource,
    text: str,
    samples: int,
    seed: int,
    seq_len: int | None = None,
) -> TokenData:
    """Return windows of a text, of --seq-len tokens unless another length is given."""
    return calibrate(text, source, CalibrationOptions(samples, seq_len or args.seq_len, seed))


def held_out_windows(
    args: argparse.Namespace, source: ModelSource, text: str, calibration: Iterable[TokenData]
) -> TokenData:
    """Return windows to measure on; refuse text that is in the calibration too."""
    check_texts(args.calibration, text)
    held_out = windows(args, source, text, args.eval_samples, 0)
    for data in calibration:
        check_windows(data.batches[0].ids, held_out.batches[0].ids, text)
    return held_out


def check_texts(calibration: str | Path, text: str | Path) -> None:
    """Refuse one text for both, whatever it is called."""
    one, other = Path(calibration).resolve(), Path(text).resolve()
    files = one.is_file() and other.is_file()
    if one == other or (files and one.read_bytes() == other.read_bytes()):
        raise ArgumentError(f"text {text} is the calibration text; give one of other documents")


def check_windows(calibration: Tensor, held_out: Tensor, text: str) -> None:
    """Refuse held-out windows that have a long run of tokens in common with calibration."""
    length = min(SHARED_RUN, calibration.shape[1])

    def runs(windows: Tensor) -> list[set[bytes]]:
        parts = windows.unfold(1, length, 1).numpy()
        return [{part.tobytes() for part in window} for window in parts]

    seen = set().union(*runs(calibration))
    sharing = sum(not seen.isdisjoint(window) for window in runs(held_out))
    if sharing:
        raise ArgumentError(
            f"{sharing} of {len(held_out)} held-out windows of {text} have {length} tokens in "
            "a row in common with calibration windows; give texts of different documents"
        )
