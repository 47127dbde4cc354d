"""Which windows are trained on, in what order, and which are held out."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions, RecoveryOptions
from hfprune_fast.errors import CalibrationError
from hfprune_fast.recovery import data
from hfprune_fast.recovery.data import RecoveryData, recovery_data


def data_of(
    folder: Path, windows: int, seed: int = 0, processes: int = 1, **options: Any
) -> RecoveryData:
    np.save(folder / "ids.npy", np.arange(windows * 8).reshape(windows, 8) % 4096)
    given = {"tokens": 160, "batch_tokens": 32, "held_out": 3} | options
    sampling = CalibrationOptions(seed=seed)
    source = open_source(TINY_MODEL)
    return recovery_data(folder / "ids.npy", source, sampling, RecoveryOptions(**given), processes)


def test_a_long_text_is_passed_over_once(tmp_path: Path, capfd: Any) -> None:
    data = data_of(tmp_path, 200)
    assert (data.steps, data.step_windows, data.tokens) == (5, 4, 160)
    assert len(data.ids) == 23  # no more is read of it than is used
    assert sorted([*data.held_out, *data.order]) == list(range(23))
    assert capfd.readouterr().err == ""


def test_a_short_text_is_passed_over_again_in_another_order(tmp_path: Path, capfd: Any) -> None:
    data = data_of(tmp_path, 12)
    assert len(data.held_out) == 1  # a tenth
    first, second = data.order[:11], data.order[11:]
    assert set(first) | set(data.held_out) == set(range(12))
    assert Counter(data.order).most_common(1)[0][1] == 2
    assert first[: len(second)] != second
    assert capfd.readouterr().err.endswith(
        "ids.npy holds 88 tokens to train on: 1.8 passes over them make 160\n"
    )


def test_many_passes_are_told_before_their_order_is_made(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(numbers: list[int], key: str) -> list[int]:
        if key != "0:held-out":
            raise KeyboardInterrupt
        return numbers

    monkeypatch.setattr(data, "_shuffled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data_of(tmp_path, 12, tokens=2**31 - 1)
    assert " 24,403,223.3 passes over them make 2,147,483,648\n" in capfd.readouterr().err


def test_the_seed_chooses(tmp_path: Path) -> None:
    some, same, others = (data_of(tmp_path, 30, seed=seed) for seed in (0, 0, 1))
    assert (some.held_out, some.order) == (same.held_out, same.order)
    assert some.held_out != others.held_out
    assert some.order != others.order


@pytest.mark.parametrize(("processes", "step"), [(1, 4), (2, 4), (3, 3), (8, 8)])
def test_processes_share_a_step(tmp_path: Path, processes: int, step: int) -> None:
    data = data_of(tmp_path, 100, processes=processes)
    assert data.step_windows == step
    assert len(data.order) % step == 0


@pytest.mark.parametrize(
    ("processes", "batch_tokens", "message"),
    [
        (1, 39, ""),  # rounded down
        (1, 10**6, ""),  # no more than are trained on
        (2, 32, ""),
        (1, 7, "a step is of 8 tokens, not 7: it takes whole samples of 8"),
        (3, 32, "a step is of 24 tokens, not 32: .*, the same number for each of 3 processes"),
        (8, 32, "a step is of 64 tokens, not 32: .*, the same number for each of 8 processes"),
    ],
)
def test_a_step_of_another_size_is_one_line(
    tmp_path: Path, capfd: Any, processes: int, batch_tokens: int, message: str
) -> None:
    data_of(tmp_path, 100, processes=processes, batch_tokens=batch_tokens)
    said = capfd.readouterr().err
    assert re.fullmatch(f"hfprune: {message}\n" if message else "", said), said


def test_too_little_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds 9 samples of 8 tokens"):
        data_of(tmp_path, 9)
    assert len(data_of(tmp_path, 9, tokens=32).held_out) == 3  # 7 are used
