"""Which experts stay and which neurons of each, and the whole job on a mixture."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mixtures import tiny_mixture
from transformers import AutoModelForCausalLM

import hfprune_fast as hf
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.checkpoint.written import stored_down_projs
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.spec import ModelSpec, spec_of
from hfprune_fast.scoring.table import ImportanceTable

Hfprune = Callable[..., Any]


def table_of(family: str, **overrides: Any) -> ImportanceTable:
    """A table of a tiny model in which no two numbers are equal."""
    spec: ModelSpec = spec_of(tiny_mixture(family, **overrides))
    generator = torch.Generator().manual_seed(0)
    neurons, experts = sum(spec.sites.values()), sum(spec.experts)
    names = ("entropy.l1", "entropy.l2", "entropy.fisher_mask", "act", "down_norm", "obs")
    statistics = {n: torch.rand(neurons, dtype=torch.float64, generator=generator) for n in names}
    for name in ("entropy.expert_taylor", "expert_reap", "expert_count", "expert_mass"):
        drawn = torch.rand(experts, dtype=torch.float64, generator=generator)
        statistics[name] = drawn * (10000 if name == "expert_count" else 1)
    return ImportanceTable(statistics, spec, {"criteria": ["entropy"]})


def experts_in(keep: Any, layer: int) -> list[int]:
    return [site[1] for site in keep if isinstance(site, tuple) and site[0] == layer]


@pytest.mark.parametrize("score", ["taylor", "reap", "count"])
def test_the_best_experts_of_each_layer_stay(score: str) -> None:
    table = table_of("qwen3_moe")
    keep = hf.select(table, expert_ratio=0.5, expert_score=score)
    name = "entropy.expert_taylor" if score == "taylor" else f"expert_{score}"
    for row, layer in enumerate((1, 2)):
        best = table.experts(name)[row].topk(2).indices.sort().values
        assert experts_in(keep, layer) == best.tolist()
    assert len(keep[0]) == 40  # of the layer without experts, whole
    assert all(len(keep[1, e]) == 24 for e in experts_in(keep, 1))


def test_each_expert_keeps_its_own_best_neurons() -> None:
    table = table_of("qwen2_moe")
    keep = hf.select(table, prune_ratio=0.3, expert_ratio=0.25)
    assert [len(keep[layer]) for layer in (0, 1)] == [28, 14]  # multiples of 4 and of 2
    for site, kept in keep.items():
        best = table.of("entropy.l1", site).topk(len(kept)).indices.sort().values
        assert torch.equal(kept, best)
    widths = {len(kept) for site, kept in keep.items() if isinstance(site, tuple)}
    assert widths == {16}  # a multiple of 8
    assert len({tuple(kept.tolist()) for kept in keep.values()}) == len(keep)


def test_groups_keep_as_many() -> None:
    table = table_of("deepseek_v3")
    keep = hf.select(table, experts=6)
    for row, layer in enumerate((1, 2)):
        by_group = table.experts("entropy.expert_taylor")[row].view(2, 4).topk(3).indices
        best = (by_group + torch.tensor([[0], [4]])).flatten().sort().values
        assert experts_in(keep, layer) == best.tolist()


def test_shared_experts_are_narrowed_as_their_key_can_say() -> None:
    keep = hf.select(table_of("deepseek_v3"), prune_ratio=0.3)
    assert len(keep[1, 0]) == 16
    assert len(keep[1]) == 2 * 16  # n_shared_experts is 2


def test_an_expert_with_few_tokens_is_not_ranked_by_removal_costs() -> None:
    table = table_of("mixtral")
    table.statistics["expert_count"][:] = 8 * 24
    table.statistics["expert_count"][1] = 8 * 24 - 1
    keep = hf.select(table, prune_ratio=0.3, statistic="obs")
    for expert, name in ((0, "obs"), (1, "entropy.l1"), (2, "obs")):
        best = table.of(name, (0, expert)).topk(16).indices.sort().values
        assert torch.equal(keep[0, expert], best)


@pytest.mark.parametrize(
    ("family", "overrides"), [("mixtral", {}), ("qwen2_moe", {}), ("gpt_oss", {})]
)
def test_param_ratio_counts_dropped_experts(family: str, overrides: dict[str, Any]) -> None:
    table = table_of(family, **overrides)
    keep = hf.select(table, param_ratio=0.3, expert_ratio=0.25, round_to=1)
    model = tiny_mixture(family, **overrides)
    dense = sum(p.numel() for p in model.parameters())
    hf.prune(model, keep)
    removed = 1 - sum(p.numel() for p in model.parameters()) / dense
    assert removed == pytest.approx(0.3, abs=0.08)  # experts' widths are multiples of 8 of 24
    assert len(experts_in(keep, 1)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of prune_ratio, param_ratio and intermediate_size"),
        ({"prune_ratio": 0.1, "param_ratio": 0.1}, "got prune_ratio and param_ratio"),
        ({"expert_ratio": 0.1, "experts": 4}, "give one of expert_ratio and experts"),
        ({"expert_ratio": 1.0}, r"expert_ratio must be in \[0, 1\)"),
        ({"experts": 9}, "experts 9 leaves 9 experts a layer; expected 4..8"),
        ({"expert_ratio": 0.9}, "expected 4..8, as 2 are chosen a token and there are 2 groups"),
        ({"experts": 5}, "which their 2 groups do not divide"),
        ({"prune_ratio": 1.0}, r"prune_ratio must be in \[0, 1\)"),
        ({"param_ratio": 0.9}, "param_ratio 0.9 cannot be reached"),
        ({"param_ratio": 0.01, "experts": 4}, "param_ratio 0.01 cannot be reached"),
        ({"intermediate_size": 25}, "intermediate_size must be in 1..24"),
        ({"prune_ratio": 0.1, "protect": (1,)}, "name all of them or none"),
        ({"prune_ratio": 0.1, "protect": (3,)}, "protect names layer 3"),
        ({"experts": 4, "protect": (1, 2)}, "of which none can be dropped"),
        ({"prune_ratio": 0.1, "protect": (0, 1, 2)}, "protect names every layer"),
        ({"prune_ratio": 0.1, "allocation": "global"}, "allocation must be uniform"),
    ],
)
def test_budgets_that_cannot_be_met(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        hf.select(table_of("deepseek_v3"), **options)


def test_protected_layers_stay() -> None:
    table = table_of("qwen2_moe")
    keep = hf.select(table, prune_ratio=0.5, protect=(0,))
    assert (len(keep[0]), len(keep[1]), len(keep[1, 0])) == (40, 10, 16)
    keep = hf.select(table, prune_ratio=0.5, protect=(1, 2))
    assert (len(keep[0]), len(keep[1]), len(keep[1, 0]), len(keep)) == (20, 20, 24, 11)


def test_a_dense_model_has_no_experts_to_drop(hfprune: Hfprune) -> None:
    done = hfprune("prune", "demo", "--calibration", "demo", "--expert-ratio", 0.5, "--out", "x")
    assert done.code == 2
    assert "expert_ratio is for models with experts" in done.err


def test_a_plan_has_a_row_for_what_is_left_of_each_kind(hfprune: Hfprune, tmp_path: Path) -> None:
    tiny_mixture("qwen2_moe").save_pretrained(tmp_path)
    run = hfprune("plan", tmp_path, "--expert-ratio", 0.25, "--prune-ratio", 0.5)
    own = r"20 to 40 \(mean 26\.7\) +10 to 20 \(mean 13\.3\) +50\.00%"
    for row in (f"MLP neurons a layer +{own}", "experts a layer +4 +3 +25", "expert +24 +16 +33"):
        assert re.search(row, run.out), run.out


def test_prune_drops_and_narrows_and_refits(
    hfprune: Hfprune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory and by the command; the model loads in its class and is closer refitted."""
    monkeypatch.chdir(tmp_path)
    model = tiny_mixture("qwen2_moe")
    model.save_pretrained("dense")
    ids = torch.randint(3, 127, (96, 32), generator=torch.Generator().manual_seed(0))
    kl = {}
    for refit in (True, False):
        out = f"pruned-{refit}"
        table = hf.score("dense", ids, criterion="fisher", obs=True)
        table.save("scores.safetensors")
        keep = hf.select(table, expert_ratio=0.25, prune_ratio=0.3, statistic="obs")
        weights = hf.refit_down_proj(model, [ids], keep) if refit else None
        pruned = tiny_mixture("qwen2_moe")
        hf.prune(pruned, keep, down_proj=weights)
        pruned.save_pretrained(out)
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert (loaded.config.num_experts, loaded.config.moe_intermediate_size) == (3, 16)
        kl[refit] = hf.evaluate(model, loaded, [ids[:16]]).kl_nats
    assert kl[True] < 0.9 * kl[False]
    done = hfprune("prune", "dense", "--scores", "scores.safetensors", "--expert-ratio", 0.25,
                   "--prune-ratio", 0.3, "--refit", "none", "--out", "by-command",
                   "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json()["experts"] == 3
    by_command = AutoModelForCausalLM.from_pretrained("by-command")
    for name, tensor in by_command.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe", "mixtral"])
def test_refitted_weights_are_written_as_they_are_put_in_memory(
    family: str, tmp_path: Path
) -> None:
    """Whether files hold an expert's weights apart, or those of all, transposed."""
    model = tiny_mixture(family)
    model.save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 127, (48, 32), generator=torch.Generator().manual_seed(0))
    table = hf.score(model, [ids])
    keep = hf.select(table, expert_ratio=0.25, prune_ratio=0.3)
    weights = hf.refit_down_proj(model, [ids], keep)
    source = open_source(tmp_path / "dense")
    replace = stored_down_projs(source, weights, keep)
    hf.prune_checkpoint(source, tmp_path / "pruned", keep, replace=replace, verify=True)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    hf.prune(model, keep, down_proj=weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, written[name]), name
