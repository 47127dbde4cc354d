"""Two processes, as torchrun starts them, recover as one does."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Prepare, hfprune_processes, kill_at
from safetensors.torch import load_file
from short_recovery import SHORT

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recover_together(
    pruned: Path, text: Path, prepare: dict[int, Prepare] | None = None
) -> list[int | None]:
    """Recover in two processes; return their exit codes."""
    flags = [
        part
        for name, value in (SHORT | {"batch_size": 1}).items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    command = ["recover", TINY_MODEL, pruned, "--text", text, "--out", "two", *flags]
    with hfprune_processes(2, *command, "--json", prepare=prepare) as processes:
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]


def test_when_one_dies_in_training_the_other_says_how_to_go_on(halves: Any, text: Path) -> None:
    dies = kill_at("hfprune_fast.recovery.trainer:RecoveryTrainer.held_out", 1)
    assert recover_together(halves("custom"), text, {1: dies}) == [2, -signal.SIGKILL]
    log = Path("log0").read_text()
    assert "error: another process of this run ended before its part was done" in log
    assert "two.recovery; the same command with --resume continues" in log


def test_two_processes_give_the_losses_of_one(halves: Any, text: Path) -> None:
    codes = recover_together(halves("custom"), text)
    assert codes == [0, 0], Path("log0").read_text() + Path("log1").read_text()
    assert Path("log1.out").read_text() == ""
    two = json.loads(Path("log0.out").read_text())
    one = hf.recover(TINY_MODEL, halves("custom"), text, "one", **SHORT)
    for key in ("losses", "held_out"):
        assert dict(two[key]) == pytest.approx(dict(one[key]), rel=1e-3)
    tensors = [load_file(Path(out) / "model.safetensors") for out in ("one", "two")]
    assert tensors[0].keys() == tensors[1].keys()
