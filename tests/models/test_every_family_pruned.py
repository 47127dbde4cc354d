"""What is written for every family is the dense model without those neurons, in transformers."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_case import F, FamilyCase, assert_same, largest_error, perplexity
from family_models import sequences
from family_truth import Float64, own_logits
from safetensors.torch import load_file

import hfprune_fast as hf
from hfprune_fast.pruning.export import export

LOGITS = 1e-12


@pytest.mark.parametrize("layout", ["uniform", "custom", "padded"])
def test_a_pruned_checkpoint_is_the_masked_model(case: FamilyCase, layout: str) -> None:
    written = case.written(layout)
    error = case.pruned_error(case.load(written.folder), written.keep)
    case.note(f"layout {layout}", error, LOGITS)
    dense, pruned = load_file(case.folder / "model.safetensors"), written.tensors
    assert dense.keys() == pruned.keys()
    others = dense.keys() - {name for name in dense if case.is_of_an_mlp(name)}
    assert 0 < len(others) < len(dense)
    assert_same({name: pruned[name] for name in others}, {name: dense[name] for name in others})


def test_a_custom_checkpoint_is_exported_padded(case: FamilyCase, tmp_path: Path) -> None:
    export(str(case.written("custom").folder), "padded", tmp_path / "padded")
    assert_same(
        load_file(tmp_path / "padded" / "model.safetensors"), case.written("padded").tensors
    )
    case.note("export padded", 0.0, 0.0)


@pytest.mark.parametrize("layout", ["uniform", "custom"])
def test_a_model_pruned_in_memory_is_the_masked_model(
    case: FamilyCase, layout: str, tmp_path: Path
) -> None:
    model, written = copy.deepcopy(case.model), case.written(layout)
    hf.prune(model, written.keep)
    case.note(f"in memory {layout}", case.pruned_error(model, written.keep), LOGITS)
    model.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), written.tensors)


def test_a_model_saved_with_different_widths_loads(case: FamilyCase, tmp_path: Path) -> None:
    model, keep = copy.deepcopy(case.model), case.written("custom").keep
    hf.prune(model, keep)
    model.save_pretrained(tmp_path)
    case.note("saved custom", case.pruned_error(case.load(tmp_path), keep), LOGITS)


def test_a_refit_that_keeps_every_neuron_returns_the_weights(case: FamilyCase) -> None:
    """The solve's condition is at most F / λ + 1; where x is 100 times W a, x - h loses so much."""
    dense = [down.weight for down in case.downs]
    with Float64():
        fitted = hf.refit_down_proj(case.model, case.batches, case.keep([F] * len(dense)))
    error = largest_error([fitted[layer] for layer in range(len(dense))], dense)
    case.note("refit", error, 100 * torch.finfo(torch.float64).eps * (F / 0.1 + 1))


def test_a_refit_is_closer_than_the_cut_alone(case: FamilyCase) -> None:
    batches = torch.stack(sequences((48,) * 16, seed=4)).split(8)
    keep = case.keep([32] * len(case.downs))
    cut, refitted = copy.deepcopy(case.model), copy.deepcopy(case.model)
    hf.prune(cut, keep)
    hf.prune(refitted, keep, down_proj=hf.refit_down_proj(case.model, batches, keep))
    kl = [hf.evaluate(case.model, model, batches).kl_nats for model in (refitted, cut)]
    assert kl[0] < 0.95 * kl[1]


def test_a_plan_counts_the_parameters_of_the_text(
    case: FamilyCase, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    shutil.copyfile(case.folder / "config.json", tmp_path / "config.json")
    run = hfprune("plan", tmp_path, "--prune-ratio", 0.25, "--json")
    assert run.code == 0, run.err
    assert run.json()["dense_params"] == case.text_params()


def test_evaluation_is_of_the_models_own_logits(case: FamilyCase) -> None:
    pruned = copy.deepcopy(case.model)
    hf.prune(pruned, case.written("uniform").keep)
    with Float64(), torch.no_grad():
        fidelity = hf.evaluate(case.model, pruned, case.batches)
        p = [z.log_softmax(-1) for z in case.logits]
        q = [own_logits(pruned, ids).log_softmax(-1) for ids in case.ids]
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).mean()
    expected = {
        "kl_nats": kl,
        "ppl_dense": perplexity(case.ids, p),
        "ppl_pruned": perplexity(case.ids, q),
    }
    for name, value in expected.items():
        error = abs(getattr(fidelity, name) - float(value)) / float(value)
        case.note("evaluation", error, 1e-9)
