"""Calibration sequences from .npy files of token ids."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfprune_fast.data import calibration
from hfprune_fast.data.calibration import token_windows
from hfprune_fast.errors import ArgumentError, CalibrationError


def test_rows_of_ids_are_read_as_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 million rows, of which no list and no order of all is made."""
    monkeypatch.setattr(calibration, "_MAX_ORDERED", 1 << 10)  # under tracemalloc
    path = tmp_path / "ids.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (20_000_000, 1))
    tracemalloc.start()
    drawn = token_windows(path, None, seq_len=None, samples=2, vocab_size=10)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn.tolist() == [[0], [0]]
    assert peak_bytes < 1_000_000


def test_a_row_longer_than_the_model_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (1, 1 << 40))
    with pytest.raises(ArgumentError, match="seq_len must be at most 64, the model's longest"):
        token_windows(path, None, seq_len=None, samples=2, vocab_size=10, longest=64)


def test_npy_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(12, dtype=np.uint16).reshape(3, 4))
    got = token_windows(path, None, seq_len=None, samples=None, vocab_size=12)
    assert got.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert got.dtype == torch.int64


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2)), "integer"),
        (np.zeros(4, dtype=np.int64), r"\(N, T\)"),
        (np.zeros((0, 4), dtype=np.int64), r"\(N, T\)"),
        (np.array([[0, -3]]), "token id -3"),
        (np.array([[0, 50]]), r"token id 50; expected 0\.\.49"),
        (np.array([[0, None]]), "not a .npy file of"),  # pickled inside
    ],
)
def test_bad_npy(tmp_path: Path, array: Any, message: str) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(CalibrationError, match=message):
        token_windows(path, None, seq_len=None, samples=None, vocab_size=50)


def test_npy_of_another_length(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros((2, 4), dtype=np.int64))
    with pytest.raises(CalibrationError, match="sequences of 4 tokens, but --seq-len is 8"):
        token_windows(path, None, seq_len=8, samples=None, vocab_size=50)
