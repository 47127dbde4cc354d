"""Runs of models with experts that are interrupted, run out of memory, or are shared."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mixtures import tiny_mixture
from torch import Tensor

import hfprune_fast as hf
from hfprune_fast.engine import expert_hooks
from hfprune_fast.scoring.passes import Pass

OPTIONS: dict[str, Any] = {"criterion": ("entropy", "fisher"), "obs": True, "seed": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_mixture("qwen2_moe").save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 127, (4, 17), generator=generator)
    lengths = torch.tensor([9, 17, 5, 12])[:, None]
    return [{"input_ids": ids, "attention_mask": (torch.arange(17) < lengths).long()}]


def test_a_resumed_run_gives_the_same_bits(
    folder: Path, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf.score(folder, batches, batch_size=1, **OPTIONS)
    add_to, passes = Pass.add_to, count()

    def interrupted(self: Pass, total: Any) -> Any:
        if next(passes) == 2:
            raise KeyboardInterrupt
        return add_to(self, total)

    saved: dict[str, Any] = {"state_file": folder.parent / "state", "save_seconds": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Pass, "add_to", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf.score(folder, batches, batch_size=1, **saved, **OPTIONS)
    resumed = hf.score(folder, batches, batch_size=1, resume=True, **saved, **OPTIONS)
    for name, tensor in whole.statistics.items():
        assert torch.equal(resumed.statistics[name], tensor), name


def test_out_of_memory_among_the_experts_counts_nothing_twice(
    folder: Path, batches: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = hf.score(folder, batches, batch_size=1, **OPTIONS)
    statistics, calls = expert_hooks._statistics, count()

    def failing(*args: Any) -> Any:
        if next(calls) == 4:
            raise torch.OutOfMemoryError("no room")
        return statistics(*args)

    monkeypatch.setattr(expert_hooks, "_statistics", failing)
    after = hf.score(folder, batches, batch_size=4, **OPTIONS)
    assert "out of memory; continuing with micro-batches of 2" in capsys.readouterr().err
    for name, tensor in whole.statistics.items():
        error = (after.statistics[name] - tensor).abs().max() / tensor.abs().max()
        assert error < 1e-4, name
