"""Pruning models with experts: what is refused before any work, and what stays as it is."""

import json
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
from hfprune_fast.errors import ArgumentError, CheckpointError, NumericsError
from hfprune_fast.models.spec import ModelSpec, spec_of
from hfprune_fast.pruning.experts import ExpertBudget
from hfprune_fast.pruning.refit_stored import refit_stored

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
    [
        ({"layout": "custom"}, "layout custom"),
        ({"recipe": "paper", "parity": True}, "no experts"),
        ({"criterion": "activation"}, "criterion activation ranks no experts by taylor"),
        ({"criterion": "random", "expert_score": "reap"}, "random ranks no experts by reap"),
        ({"prune_ratio": 0.3, "round_to": 1000}, "multiples of 1000"),
        ({"allocation": "global"}, "allocation global is not for models with experts"),
    ],
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
        replace, _ = refit_stored(model, batches, source, keep)
    assert list(replace) == ["model.layers.0.mlp.down_proj.weight"]
    hf.prune_checkpoint(source, tmp_path / "out", keep, replace=replace)
    dense, written = (
        load_file(folder / "model.safetensors") for folder in (source.folder, tmp_path / "out")
    )
    assert torch.equal(
        written["model.layers.1.mlp.experts.0.down_proj.weight"],
        dense["model.layers.1.mlp.experts.1.down_proj.weight"],
    )


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ([(1, 0)], "leave each layer the same number of experts"),
        ([(n, e) for n in (1, 2) for e in range(3)], "at least the 2 experts"),
    ],
)
def test_a_refit_takes_what_can_be_written(without: list[Any], message: str) -> None:
    model = tiny_mixture("qwen3_moe")
    keep = {
        site: torch.arange(w) for site, w in spec_of(model).sites.items() if site not in without
    }
    with pytest.raises(ArgumentError, match=message):
        hf.refit_down_proj(model, [torch.arange(40).view(2, 20)], keep)


def test_a_report_takes_the_scores_that_experts_were_pruned_with(
    hfprune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, 127, (4, 16), generator=torch.Generator().manual_seed(0))
    for seed, name in enumerate(("dense", "other")):
        tiny_mixture("qwen3_moe", seed=seed).save_pretrained(name)
        hf.score(name, ids).save(f"{name}.safetensors")
    budget = ["--expert-ratio", 0.25, "--prune-ratio", 0.3, "--refit", "none"]
    done = hfprune("prune", "dense", "--scores", "dense.safetensors", *budget, "--out", "pruned")
    assert done.code == 0, done.err
    for name, code in (("dense", 0), ("other", 2)):
        scores = ["--scores", f"{name}.safetensors"]
        done = hfprune("report", "pruned", *scores, "--out", f"{name}.html")
        assert done.code == code, done.err
    assert "these scores are not the ones this model was pruned with" in done.err


def test_nan_in_a_stored_buffer_is_named() -> None:
    model = tiny_mixture("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[0] = torch.nan
    with pytest.raises(NumericsError, match="e_score_correction_bias holds NaN"):
        hf.score(model, [torch.arange(40).view(2, 20)])


def test_a_null_number_of_chosen_experts_is_refused(save_checkpoint: Callable[..., Path]) -> None:
    folder = save_checkpoint(tiny_mixture("qwen3_moe"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts_per_tok": None}))
    with pytest.raises(CheckpointError, match="num_experts_per_tok null"):
        open_source(folder)
