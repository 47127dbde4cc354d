"""hfprune export reads the record of a pruned model as every other command does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfprune_fast as hf

Hfprune = Callable[..., Any]


@pytest.fixture
def record(llama_dir: Path, tmp_path: Path) -> Path:
    """The record of a pruned model with a width for each layer."""
    keep = {layer: torch.arange(96 - 16 * layer) for layer in range(3)}
    hf.prune_checkpoint(llama_dir, tmp_path / "pruned", keep)
    return tmp_path / "pruned" / "hfprune.json"


def test_a_long_record(record: Path, tmp_path: Path, hfprune: Hfprune) -> None:
    """The kept neurons of a large model take more room than an index of its tensors may."""
    record.write_text(record.read_text() + " " * (65 << 20))
    run = hfprune("export", record.parent, "--to", "padded", "--out", tmp_path / "out")
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    ("name", "value"), [("dense_params", None), ("dense_params", 0), ("prune_ratio", "<b>")]
)
def test_a_damaged_record_is_one_line(
    record: Path, tmp_path: Path, hfprune: Hfprune, name: str, value: object
) -> None:
    found = json.loads(record.read_text())
    found["achieved"][name] = value
    record.write_text(json.dumps(found))
    run = hfprune("export", record.parent, "--to", "padded", "--out", tmp_path / "out")
    assert run.code == 2, run.err
    assert "hfprune.json is damaged" in run.err.splitlines()[-1]
