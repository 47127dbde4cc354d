"""What is written for every family is the dense model without those neurons, in transformers."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_case import F, FamilyCase, largest_error
from family_truth import Float64, masked_logits, own_logits
from safetensors.torch import load_file
from torch import Tensor

import hfprune_fast as hf
from hfprune_fast.pruning.export import export

LOGITS = 1e-12
NARROW = (17, F, 9, 24, 31, 5)
LAYOUTS = ("uniform", "custom", "padded")


def widths_of(case: FamilyCase, layout: str) -> tuple[int, ...]:
    layers = len(case.downs)
    return (24,) * layers if layout == "uniform" else NARROW[:layers]


def logits_error(case: FamilyCase, model: Any, keep: Any) -> float:
    with Float64(), torch.no_grad():
        got = [own_logits(model, ids) for ids in case.ids]
        masked = [masked_logits(case.model, case.downs, keep, ids) for ids in case.ids]
    return largest_error(got, masked)


def write(case: FamilyCase, layout: str, out: Path) -> dict[int, Tensor]:
    keep = case.keep(widths_of(case, layout))
    hf.prune_checkpoint(
        case.folder, out, keep, layout="auto" if layout == "uniform" else layout, verify=True
    )
    return keep


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pruned_checkpoint_is_the_masked_model(
    case: FamilyCase, layout: str, tmp_path: Path
) -> None:
    keep = write(case, layout, tmp_path / "out")
    error = logits_error(case, case.load(tmp_path / "out"), keep)
    case.note(f"layout {layout}", error, LOGITS)
    dense, pruned = (load_file(f / "model.safetensors") for f in (case.folder, tmp_path / "out"))
    assert dense.keys() == pruned.keys()
    other = [name for name in dense if not case.is_of_an_mlp(name)]
    assert 0 < len(other) < len(dense)
    assert [n for n in other if not torch.equal(dense[n], pruned[n])] == []
    assert [n for n in other if dense[n].dtype != pruned[n].dtype] == []


def test_a_custom_checkpoint_is_exported_padded(case: FamilyCase, tmp_path: Path) -> None:
    keep = write(case, "custom", tmp_path / "custom")
    export(str(tmp_path / "custom"), "padded", tmp_path / "padded")
    error = logits_error(case, case.load(tmp_path / "padded"), keep)
    case.note("export padded", error, LOGITS)


@pytest.mark.parametrize("layout", ["uniform", "custom"])
def test_a_model_pruned_in_memory_is_the_masked_model(
    case: FamilyCase, layout: str, tmp_path: Path
) -> None:
    model = copy.deepcopy(case.model)
    keep = case.keep(widths_of(case, layout))
    hf.prune(model, keep)
    case.note(f"in memory {layout}", logits_error(case, model, keep), LOGITS)
    model.save_pretrained(tmp_path)
    case.note(f"saved {layout}", logits_error(case, case.load(tmp_path), keep), LOGITS)


def test_a_refit_that_keeps_every_neuron_returns_the_weights(case: FamilyCase) -> None:
    """The solve's condition is at most F / λ + 1; where x is 100 times W a, x - h loses so much."""
    dense = [down.weight for down in case.downs]
    with Float64():
        fitted = hf.refit_down_proj(case.model, case.batches, case.keep([F] * len(dense)))
    error = largest_error([fitted[layer] for layer in range(len(dense))], dense)
    case.note("refit", error, 100 * torch.finfo(torch.float64).eps * (F / 0.1 + 1))


def test_a_plan_counts_the_parameters_of_the_text(
    case: FamilyCase, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    shutil.copyfile(case.folder / "config.json", tmp_path / "config.json")
    run = hfprune("plan", tmp_path, "--prune-ratio", 0.25, "--json")
    assert run.code == 0, run.err
    assert run.json()["dense_params"] == case.text_params()


def test_evaluation_is_of_the_models_own_logits(case: FamilyCase) -> None:
    pruned = copy.deepcopy(case.model)
    hf.prune(pruned, case.keep(widths_of(case, "uniform")))
    with Float64(), torch.no_grad():
        fidelity = hf.evaluate(case.model, pruned, case.batches)
        p = [z.log_softmax(-1) for z in case.logits]
        q = [own_logits(pruned, ids).log_softmax(-1) for ids in case.ids]
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]).mean()
    expected = {"kl_nats": kl, "ppl_dense": perplexity(case, p), "ppl_pruned": perplexity(case, q)}
    for name, value in expected.items():
        error = abs(getattr(fidelity, name) - float(value)) / float(value)
        case.note("evaluation", error, 1e-9)


def perplexity(case: FamilyCase, log_p: list[Tensor]) -> Tensor:
    next_tokens = [
        rows[:-1].gather(1, ids[1:, None]) for rows, ids in zip(log_p, case.ids, strict=True)
    ]
    return (-torch.cat(next_tokens).mean()).exp()
