"""Pruning models with experts: what is refused before any work, and what stays as it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_mixtures import tiny_mixture

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import Budget
from hfprune_fast.data.batches import as_batches, token_data
from hfprune_fast.engine import layerwise
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.experts import ExpertBudget
from hfprune_fast.pruning.oneshot import refit_stored

# 6 experts a token, from 2 of 4 groups: each group needs 3.
GROUPED = ModelSpec(
    "deepseek_v3", 2, 8, 0, 10_000, 9_000, 24, mlp_widths=(0, 0), experts=(32, 32), expert_width=16,
    experts_per_token=6, expert_params_per_neuron=24, expert_groups=4, groups_per_token=2,
)  # fmt: skip


def test_each_group_keeps_what_a_token_may_choose_from_it() -> None:
    assert ExpertBudget.of(GROUPED, Budget(experts=12)).experts == 12
    with pytest.raises(ArgumentError, match=r"experts 8 leaves 8 .* expected 12\.\.32"):
        ExpertBudget.of(GROUPED, Budget(experts=8))
    ungrouped = replace(GROUPED, expert_groups=1, groups_per_token=1)
    assert ExpertBudget.of(ungrouped, Budget(experts=6)).experts == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layout": "custom"}, "layout custom"), ({"recipe": "paper", "parity": True}, "no experts")],
)
def test_what_experts_do_not_have_is_refused_before_weights_are_loaded(
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    folder = save_checkpoint(tiny_mixture("qwen3_moe", vocab_size=2048))
    monkeypatch.setattr(layerwise.ResidentModel, "__init__", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ArgumentError, match=message):
        hf.oneshot(folder, text_file, tmp_path / "out", expert_ratio=0.25, **options)


def test_experts_that_are_not_refitted_keep_the_bits_that_are_stored(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The refit ran in bfloat16, in which the stored float32 would be rounded."""
    source = open_source(save_checkpoint(tiny_mixture("qwen3_moe")))
    keep = {site: torch.arange(w) for site, w in source.spec.sites.items() if site != (1, 0)}
    keep = {site: kept for site, kept in keep.items() if site != (2, 3)}
    batches = token_data(as_batches([torch.arange(40).view(2, 20)]), 127).batches
    with open_model(blueprint(source, dtype="bfloat16"), "none") as model:
        replace = refit_stored(model, batches, source, keep)
    assert list(replace) == ["model.layers.0.mlp.down_proj.weight"]
    hf.prune_checkpoint(source, tmp_path / "out", keep, replace=replace)
    dense, written = (
        load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path / "out")
    )
    assert torch.equal(
        written["model.layers.1.mlp.experts.0.down_proj.weight"],
        dense["model.layers.1.mlp.experts.1.down_proj.weight"],
    )
