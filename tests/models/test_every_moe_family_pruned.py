"""Without experts, or neurons of experts, every family is the masked model, in transformers."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_truth import SEED
from experts_truth import Site, down_of
from family_case import assert_same, largest_error, perplexity
from family_models import sequences
from family_truth import Float64, own_logits
from mixture_case import (
    FORMS_IN_TURN,
    KEPT_OF_EXPERT,
    SOME_MIXTURES,
    MixtureCase,
    expert_errors,
    mixtures_in_turn,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import hfprune_fast as hf

LOGITS = 1e-12


@pytest.fixture
def form(request: pytest.FixtureRequest, mixture: MixtureCase) -> str:
    """What is removed: experts, their neurons, neurons of the other MLPs, or some of each."""
    if request.param == "own" and all(not isinstance(site, int) for site in mixture.widths):
        pytest.skip("its layers have experts alone")
    return str(request.param)


forms_in_turn = pytest.mark.parametrize(("mixture", "form"), FORMS_IN_TURN, indirect=True)
# What dropped experts said is not made up for where norms follow the experts, as in Gemma.
MOST_OF_THE_CUT = {"dropped": 1.0, "narrowed": 0.95, "all": 0.98}


@forms_in_turn
def test_masks_change_the_logits(mixture: MixtureCase, form: str) -> None:
    """Each form has something to be forgotten."""
    assert largest_error(mixture.masked(mixture.keep_of(form)), mixture.logits) > 1e-2


@forms_in_turn
def test_a_pruned_checkpoint_is_the_masked_model(mixture: MixtureCase, form: str) -> None:
    written = mixture.written(form)
    error = mixture.pruned_error(mixture.load(written.folder), written.keep)
    mixture.note(f"layout {form}", error, LOGITS)
    dense, pruned = load_file(mixture.folder / "model.safetensors"), written.tensors
    others = {name for name in dense if not mixture.is_cut(name)}
    assert 0 < len(others) < len(dense)
    assert others == {name for name in pruned if not mixture.is_cut(name)}
    assert_same({name: pruned[name] for name in others}, {name: dense[name] for name in others})


def test_a_pruned_checkpoint_says_what_was_kept(mixture: MixtureCase) -> None:
    """By module path in the model, experts by their dense numbers."""
    written = mixture.written("all")
    record = json.loads((written.folder / "hfprune.json").read_text())
    paths, experts = paths_of(mixture, written.keep)
    assert record["keep"] == {path: written.keep[site].tolist() for site, path in paths.items()}
    assert record["experts"] == experts


def paths_of(
    mixture: MixtureCase, keep: dict[Site, Tensor]
) -> tuple[dict[Site, str], dict[str, list[int]]]:
    """Return the module path of each site, and {path of a layer's experts: those that stay}."""
    tiny, paths, experts = mixture.tiny, {}, {}
    for site in keep:
        layer = site if isinstance(site, int) else site[0]
        if isinstance(site, int):
            beside = layer in mixture.layers_with_experts
            down = tiny.shared if beside else tiny.down
            paths[site] = f"{tiny.layers}.{layer}.{down.rpartition('.')[0]}"
        else:
            path = f"{tiny.layers}.{layer}.{tiny.experts}"
            experts.setdefault(path, []).append(site[1])
            paths[site] = f"{path}.{site[1]}"
    return paths, experts


@forms_in_turn
def test_a_model_pruned_in_memory_is_the_masked_model(
    mixture: MixtureCase, form: str, tmp_path: Path
) -> None:
    """And saves what is written on disk."""
    model, written = copy.deepcopy(mixture.model), mixture.written(form)
    hf.prune(model, written.keep)
    mixture.note(f"in memory {form}", mixture.pruned_error(model, written.keep), LOGITS)
    model.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), written.tensors)
    saved = mixture.pruned_error(mixture.load(tmp_path), written.keep)
    mixture.note(f"saved {form}", saved, LOGITS)


@pytest.mark.slow
@pytest.mark.parametrize("mixture", SOME_MIXTURES, indirect=True)
def test_parameters_as_they_are_in_memory_are_read_and_cut_too(
    mixture: MixtureCase, tmp_path: Path
) -> None:
    """Files may hold a layer's experts in one tensor, where others hold each in three."""
    shutil.copytree(mixture.folder, tmp_path / "dense")
    stored = mixture.model.state_dict()
    if mixture.model.config.tie_word_embeddings:
        stored.pop("lm_head.weight")
    save_file(stored, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    folder, criteria = tmp_path / "dense", ("entropy", "fisher")
    with Float64():
        table = hf.score(folder, mixture.batches, criterion=criteria, seed=SEED, offload="disk")
    assert max(expert_errors(table, mixture.experts_truth).values()) < 1e-9
    keep = mixture.keep_of("all")
    hf.prune_checkpoint(folder, tmp_path / "out", keep, verify=True)
    assert mixture.pruned_error(mixture.load(tmp_path / "out"), keep) < LOGITS
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == stored.keys()


@pytest.mark.slow
def test_a_pruned_checkpoint_is_pruned_again(mixture: MixtureCase, tmp_path: Path) -> None:
    """Its experts have new numbers, in their order."""
    written = mixture.written("all")
    keep: dict[Site, Tensor] = {}
    for site, kept in written.keep.items():
        count = len(kept) // KEPT_OF_EXPERT * 6 if len(kept) % KEPT_OF_EXPERT == 0 else 5
        keep[site] = torch.arange(count) * 2 + 1
    again: dict[Site, Tensor] = {}
    for site, indices in keep.items():
        if not isinstance(site, int):
            site = site[0], sum(not isinstance(s, int) and s[0] == site[0] for s in again)
        again[site] = indices
    hf.prune_checkpoint(written.folder, tmp_path / "out", again, verify=True)
    composed = {site: written.keep[site][indices] for site, indices in keep.items()}
    assert mixture.pruned_error(mixture.load(tmp_path / "out"), composed) < LOGITS


@pytest.mark.slow
def test_a_refit_that_keeps_every_neuron_returns_the_weights(mixture: MixtureCase) -> None:
    """The solve's condition is at most F / λ + 1; where x is 100 times W a, x - h loses so much."""
    batches = torch.stack(sequences((96,) * 10, seed=6)).split(5)
    with Float64():
        fitted = hf.refit_down_proj(mixture.model, batches, mixture.keep_all())
    dense = {site: down_of(mixture.tiny, mixture.model, site) for site in mixture.widths}
    assert fitted.keys() <= dense.keys()
    assert {site for site in dense if isinstance(site, int)} <= fitted.keys()
    assert any(not isinstance(site, int) for site in fitted)
    error = largest_error([fitted[site] for site in fitted], [dense[site] for site in fitted])
    widest = max(mixture.widths.values())
    mixture.note("refit", error, 100 * torch.finfo(torch.float64).eps * (widest / 0.1 + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixture", "form"), mixtures_in_turn(list(MOST_OF_THE_CUT)), indirect=["mixture"]
)
def test_a_refit_is_closer_than_the_cut_alone(mixture: MixtureCase, form: str) -> None:
    batches = torch.stack(sequences((96,) * 16, seed=4)).split(8)
    keep = mixture.keep_of(form)
    cut, refitted = copy.deepcopy(mixture.model), copy.deepcopy(mixture.model)
    hf.prune(cut, keep)
    hf.prune(refitted, keep, down_proj=hf.refit_down_proj(mixture.model, batches, keep))
    kl = [hf.evaluate(mixture.model, model, batches).kl_nats for model in (refitted, cut)]
    assert kl[0] <= MOST_OF_THE_CUT[form] * kl[1], kl


def test_a_plan_counts_the_parameters_of_the_text(
    mixture: MixtureCase, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    shutil.copyfile(mixture.folder / "config.json", tmp_path / "config.json")
    run = hfprune("plan", tmp_path, "--prune-ratio", 0.25, "--json")
    assert run.code == 0, run.err
    assert run.json()["dense_params"] == mixture.text_params()


@pytest.mark.slow
def test_evaluation_is_of_the_models_own_logits(mixture: MixtureCase) -> None:
    pruned = copy.deepcopy(mixture.model)
    hf.prune(pruned, mixture.keep_of("all"))
    with Float64(), torch.no_grad():
        fidelity = hf.evaluate(mixture.model, pruned, mixture.batches)
        p = [z.log_softmax(-1) for z in mixture.logits]
        q = [own_logits(pruned, ids).log_softmax(-1) for ids in mixture.ids]
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).mean()
    expected = {
        "kl_nats": kl,
        "ppl_dense": perplexity(mixture.ids, p),
        "ppl_pruned": perplexity(mixture.ids, q),
    }
    for name, value in expected.items():
        error = abs(getattr(fidelity, name) - float(value)) / float(value)
        mixture.note("evaluation", error, 1e-9)
