"""Experts whose parameters files hold with their last two axes swapped, as Qwen3-VL's are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from criteria_truth import SEED
from family_truth import Float64
from mixture_case import MixtureCase, expert_errors
from safetensors.torch import load_file, save_file

import hfprune_fast as hf
from hfprune_fast.errors import ArgumentError

OF_ALL = ("experts.gate_up_proj", "experts.down_proj")


def swapped(folder: Path, out: Path) -> Path:
    """Write a folder anew in the form that is published; transformers writes the other one."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: tensor.mT.contiguous() if name.endswith(OF_ALL) else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> MixtureCase:
    return MixtureCase.save("qwen3_vl_moe", tmp_path_factory.mktemp("straight") / "dense")


@pytest.fixture(scope="module")
def across(case: MixtureCase) -> Path:
    return swapped(case.folder, case.folder.parent / "across")


@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_scores_are_those_of_the_other_form(case: MixtureCase, across: Path, offload: str) -> None:
    with Float64():
        table = hf.score(
            across, case.batches, criterion=("entropy", "fisher"), seed=SEED, offload=offload
        )
    errors = expert_errors(table, case.experts_truth)
    assert max(errors.values()) < 1e-9, errors


def test_a_pruned_one_is_of_its_form_and_the_masked_model(
    case: MixtureCase, across: Path, tmp_path: Path
) -> None:
    keep = case.keep_of("all")
    hf.prune_checkpoint(across, tmp_path / "out", keep, verify=True)
    shapes = {
        name.rpartition(".")[2]: tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if name.endswith(OF_ALL)
    }
    assert shapes == {"gate_up_proj": (5, 32, 26), "down_proj": (5, 13, 32)}
    assert case.pruned_error(case.load(tmp_path / "out"), keep) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"prune_ratio": 0.6, "experts": 6, "allocation": "uniform"},
        {"prune_ratio": 0.6, "criterion": "magnitude", "select": "statistic", "refit": "none"},
    ],
    ids=["refitted", "magnitude"],
)
def test_both_forms_are_pruned_alike(
    case: MixtureCase, across: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, torch.arange(2400).mul(37).remainder(127).view(40, 60).numpy())
    files = []
    for folder in (case.folder, across):
        out = tmp_path / folder.name
        with Float64():
            hf.oneshot(folder, ids, out, samples=None, **options)
        files.append(load_file(out / "model.safetensors"))
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        other = files[1][name]
        assert torch.equal(tensor, other.mT if name.endswith(OF_ALL) else other), name


@pytest.mark.slow
def test_both_forms_are_recovered_alike(case: MixtureCase, across: Path, tmp_path: Path) -> None:
    ids, keep, files = tmp_path / "ids.npy", case.keep_of("all"), []
    np.save(ids, torch.arange(1280).mul(37).remainder(127).view(40, 32).numpy())
    for folder in (case.folder, across):
        pruned, out = tmp_path / f"{folder.name}-pruned", tmp_path / f"{folder.name}-out"
        hf.prune_checkpoint(folder, pruned, keep)
        with Float64():
            done = hf.recover(folder, pruned, ids, out, tokens=640, batch_tokens=64, lora=4)
        assert done["best_step"] > 0
        files.append(
            (load_file(pruned / "model.safetensors"), load_file(out / "model.safetensors"))
        )
    (before, after), (_, other) = files
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert {name.rpartition(".")[2] for name in changed} >= {"gate_up_proj", "down_proj"}
    for name, tensor in after.items():
        theirs = other[name].mT if name.endswith(OF_ALL) else other[name]
        assert torch.allclose(tensor, theirs, rtol=1e-9, atol=1e-12), name


def test_a_width_that_makes_a_matrix_square_is_refused(
    case: MixtureCase, across: Path, hfprune: Callable[..., Any], tmp_path: Path
) -> None:
    """transformers tells the form by the shape, and would not swap a square one's axes."""
    keep = {
        site: kept if isinstance(site, int) else kept[:16]  # gate and up are 32, as the stream is
        for site, kept in case.keep_all().items()
    }
    with pytest.raises(ArgumentError, match=r"would be 32 by 32.* choose another width"):
        hf.prune_checkpoint(across, tmp_path / "out", keep)
    assert not (tmp_path / "out").exists()
    hf.prune_checkpoint(case.folder, tmp_path / "out", keep)
    assert case.pruned_error(case.load(tmp_path / "out"), keep) < 1e-12
