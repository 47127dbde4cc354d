"""Two processes, as torchrun starts them, recover as one does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import hfprune_processes
from safetensors.torch import load_file
from short_recovery import SHORT

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


def test_two_processes_give_the_losses_of_one(
    halves: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [
        part
        for name, value in (SHORT | {"batch_size": 1}).items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    command = ["recover", TINY_MODEL, halves("custom"), "--text", text, "--out", "two", *flags]
    with hfprune_processes(2, *command, "--json") as processes:
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
    assert codes == [0, 0], Path("log0").read_text() + Path("log1").read_text()
    assert Path("log1.out").read_text() == ""
    two = json.loads(Path("log0.out").read_text())
    one = hf.recover(TINY_MODEL, halves("custom"), text, "one", **SHORT)
    for key in ("losses", "held_out"):
        assert dict(two[key]) == pytest.approx(dict(one[key]), rel=1e-3)
    tensors = [load_file(Path(out) / "model.safetensors") for out in ("one", "two")]
    assert tensors[0].keys() == tensors[1].keys()
