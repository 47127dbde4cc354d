"""Models whose layers have different widths, scored, pruned again and evaluated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from tolerances import assert_no_worse
from uneven import WIDTHS, keep_of

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.commands import evaluate
from hfprune_fast.pruning.selection import WidthBudget
from hfprune_fast.scoring.table import check_table


def test_scores_are_those_of_the_padded_model(llama_dir: Path, tmp_path: Path) -> None:
    keep, ids = keep_of(), torch.arange(96).view(4, 24) % 127
    for layout in ("custom", "padded"):
        hf.prune_checkpoint(llama_dir, tmp_path / layout, keep, layout=layout)
    table, padded = (hf.score(tmp_path / x, ids, device="cpu") for x in ("custom", "padded"))
    exact = hf.score(tmp_path / "padded", ids, device="cpu", dtype="float64")
    assert table.model.mlp_widths == WIDTHS
    for name in ("l1", "l2", "fisher_mask", "act", "down_norm"):
        ours, theirs, truth = (getattr(t, name) for t in (table, padded, exact))
        assert_no_worse(ours, theirs, truth, floor=16 * torch.finfo(torch.float32).eps)
        for layer, width in enumerate(WIDTHS):
            assert not ours[layer, width:].any()
            assert ours[layer, :width].all()
    table.save(tmp_path / "scores.safetensors")
    loaded = hf.ImportanceTable.load(tmp_path / "scores.safetensors")
    assert loaded.model == table.model
    custom = open_source(tmp_path / "custom")
    check_table(loaded, custom)
    check_table(hf.score(loading.load_model(custom), ids), custom)
    halved = hf.select(table, prune_ratio=0.5, round_to=1)
    assert [len(kept) for kept in halved.values()] == [(width + 1) // 2 for width in WIDTHS]
    for offload in ("disk", "cpu"):
        streamed = hf.score(tmp_path / "custom", ids, device="cpu", offload=offload)
        assert torch.equal(streamed.l1, table.l1)


def test_scored_and_pruned_from_the_command_line(
    llama_dir: Path, tmp_path: Path, hfprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WidthBudget, "keep", lambda *_, **__: keep_of())
    text = ["--calibration", "demo", "--samples", 2, "--seq-len", 32, "--device", "cpu"]
    run = hfprune("prune", llama_dir, "--out", tmp_path / "out", "--prune-ratio", 0.3, *text)
    assert run.code == 0, run.err
    assert "MLP neurons a layer 30 to 96 (mean 62.3) of 96 (35.07% of the neurons)" in run.out
    run = hfprune("score", tmp_path / "out", "--out", tmp_path / "scores", *text)
    assert run.code == 0, run.err
    assert "3 layers x 30 to 96 (mean 62.3) neurons scored" in run.out
    run = hfprune("plan", tmp_path / "out", "--prune-ratio", 0.3)
    assert run.code == 0, run.err
    assert "30 to 96 (mean 62.3)" in run.out


@pytest.mark.parametrize("layout", ["custom", "padded"])
def test_evaluated_from_the_command_line(
    llama_dir: Path, tmp_path: Path, hfprune: Callable[..., Any], layout: str
) -> None:
    hf.prune_checkpoint(llama_dir, tmp_path / "out", keep_of(), layout=layout)
    code = tmp_path / "out" / "modeling_hfprune.py"
    if code.exists():
        code.write_text("raise SystemExit('the folder has run its code')")
    model = random_llama()
    hf.prune(model, keep_of())
    numbers = []
    for offload in ("none", "disk"):
        options = ["--text", "demo", "--samples", 2, "--seq-len", 32, "--device", "cpu", "--json"]
        run = hfprune("evaluate", llama_dir, tmp_path / "out", *options, "--offload", offload)
        assert run.code == 0, run.err
        numbers.append(json.loads(run.out))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert numbers[0]["kl_nats"] > 0.01
    same = evaluate.run(tmp_path / "out", tmp_path / "out", "demo", samples=2, seq_len=32)
    assert same["kl_nats"] == 0
