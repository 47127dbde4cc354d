"""What is written for every family is the dense model without those neurons, in transformers."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_case import F, FamilyCase, assert_same, largest_error, perplexity
from family_configs import V
from family_models import every_other, in_turn, sequences
from family_truth import Float64, own_logits
from safetensors.torch import load_file

import hfprune_fast as hf
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.checkpoint.written import stored_down_projs, stored_rows
from hfprune_fast.data.batches import as_batches, token_data
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.models.plain import plain_model
from hfprune_fast.pruning.export import export
from hfprune_fast.pruning.refit import refit

LOGITS = 1e-12


@pytest.mark.parametrize(
    ("case", "layout"), in_turn(["uniform", "custom", "padded"]), indirect=["case"]
)
def test_a_pruned_checkpoint_is_the_masked_model(case: FamilyCase, layout: str) -> None:
    written = case.written(layout)
    error = case.pruned_error(case.load(written.folder), written.keep)
    case.note(f"layout {layout}", error, LOGITS)
    dense, pruned = load_file(case.folder / "model.safetensors"), written.tensors
    assert dense.keys() == pruned.keys()
    others = dense.keys() - {name for name in dense if case.is_of_an_mlp(name)}
    assert 0 < len(others) < len(dense)
    assert_same({name: pruned[name] for name in others}, {name: dense[name] for name in others})


@pytest.mark.parametrize("case", every_other(), indirect=True)
def test_a_custom_checkpoint_is_exported_padded(case: FamilyCase, tmp_path: Path) -> None:
    export(str(case.written("custom").folder), "padded", tmp_path / "padded")
    assert_same(
        load_file(tmp_path / "padded" / "model.safetensors"), case.written("padded").tensors
    )
    case.note("export padded", 0.0, 0.0)


@pytest.mark.parametrize(("case", "layout"), in_turn(["uniform", "custom"]), indirect=["case"])
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


@pytest.mark.parametrize("case", every_other(), indirect=True)
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


@pytest.mark.parametrize("case", every_other(), indirect=True)
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


@pytest.mark.parametrize("case", every_other(), indirect=True)
def test_a_reconstruction_is_of_the_layer_as_the_family_runs_it(
    case: FamilyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written has the streams that it was trained by, and all layers are understood."""
    for name in ("hfprune_fast.pruning.reconstruct", "hfprune_fast.pruning.refit"):
        monkeypatch.setattr(f"{name}.STEPS", 8)
    monkeypatch.setattr("hfprune_fast.pruning.reconstruct._RATE", 3e-4)
    batches = token_data(
        as_batches(torch.stack(sequences((48,) * 32, seed=4)).split(16)), V
    ).batches
    keep = case.keep([32] * len(case.downs))
    with Float64(), ResidentModel(plain_model(case.model, "refit")) as entered:
        (result,), _ = refit(entered, batches, [keep], held_out=1, reconstruct={})
        expected = entered.head()(result.hidden[0])
    assert result.untrained == 0
    source, dense = open_source(case.folder), load_file(case.folder / "model.safetensors")
    moved = [
        not (dense[source.rows_of_mlp(layer)[0]] == rows[0][0]).all(dim=1).any()
        for layer, rows in result.rows.items()
    ]
    assert any(moved)
    replace = stored_down_projs(source, result.weights, keep) | stored_rows(source, result.rows)
    hf.prune_checkpoint(case.folder, tmp_path / "out", keep, replace=replace)
    model = case.load(tmp_path / "out")
    with Float64(), torch.no_grad():
        got = torch.stack([own_logits(model, ids) for ids in batches[-1].ids])
    case.note("reconstructed", largest_error(got, expected), LOGITS)
