"""Which layer keeps how many neurons."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import Budget, CalibrationOptions, Recipe
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import ArgumentError
from hfprune_fast.pruning import allocation
from hfprune_fast.pruning.allocation import held_out_kl, trial_batches
from hfprune_fast.pruning.layer_factors import layer_factors
from hfprune_fast.pruning.refit import refit
from hfprune_fast.pruning.refit_stored import refit_stored
from hfprune_fast.pruning.selection import WidthBudget


def batches_of(samples: int, at_once: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(127, (samples, 20), generator=generator)
    return numbered(MicroBatch(part, (20,) * len(part)) for part in ids.split(at_once))


def oneshot_record(folder: Path, text: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Prune by half and return hfprune.json."""
    hf.oneshot(folder, text, out, prune_ratio=0.5, **options)
    record: dict[str, Any] = json.loads((out / "hfprune.json").read_text())
    return record


@pytest.mark.parametrize(("kl", "chosen"), [([1, 2], "uniform"), ([2, 1], "measured")])
def test_auto_takes_the_closest(
    kl: list[float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    importance = torch.rand(3, 40, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [5.0]])
    factors = torch.tensor([9.0, 0.1, 2.0], dtype=torch.float64)
    monkeypatch.setattr(allocation, "layer_factors", lambda *_: factors)
    monkeypatch.setattr(allocation, "held_out_kl", lambda *_: kl)
    model: Any = object()  # which only those two look at
    budget, batches = WidthBudget(20, (40,) * 3), batches_of(8, 2)
    expected = {
        "uniform": budget.keep(importance),
        "measured": budget.keep(importance * factors[:, None], "global"),
    }
    for recipe, allocated in (Recipe(), chosen), (Recipe(allocation="measured"), "measured"):
        keep, record = allocation.choose(model, batches, importance, budget, recipe)
        assert all(torch.equal(keep[layer], expected[allocated][layer]) for layer in keep)
        assert record["allocation"] == allocated
        kl_nats = record.get("allocations_kl_nats")
        assert kl_nats == (
            None if allocated == recipe.allocation else dict(zip(expected, kl, strict=True))
        )
        with pytest.raises(ArgumentError, match=f"{recipe.allocation} needs --calibration"):
            allocation.choose(None, [], importance, budget, recipe)


@pytest.mark.parametrize("budget", [{"prune_ratio": 0}, {"prune_ratio": 0.01, "round_to": 8}])
def test_nothing_is_measured_where_nothing_is_removed(
    budget: dict[str, Any], llama_dir: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(allocation, "layer_factors", lambda *_: pytest.fail("measured"))
    options: dict[str, Any] = {"samples": 4, "seq_len": 16, **budget}
    for name in ("auto", "measured"):
        made = hf.oneshot(llama_dir, text_file, tmp_path / name, allocation=name, **options)
        assert (made["params"], made["allocation"]) == (made["dense_params"], "uniform")
        assert "allocations_kl_nats" not in made


def test_held_out_kl_is_that_of_the_pruned_model() -> None:
    model = tiny_model("llama")
    batches = batches_of(8, 2)
    importance = torch.rand(3, 96, dtype=torch.float64)
    keeps = [WidthBudget(48, (96,) * 3).keep(importance, share) for share in (0.0, 1.0)]
    with ResidentModel(model) as entered:
        got = held_out_kl(entered, batches, keeps, 1)
        fitted, _ = refit(entered, batches[:3], keeps)
    for kl, keep, result in zip(got, keeps, fitted, strict=True):
        cut = copy.deepcopy(model)
        hf.prune(cut, keep)
        for layer, weight in result.weights.items():
            cut.model.layers[layer].mlp.down_proj.weight.copy_(weight)
        assert kl == pytest.approx(hf.evaluate(model, cut, [batches[3].ids]).kl_nats, rel=1e-6)


def test_a_trial_has_something_to_hold_out() -> None:
    assert [len(b.ids) for b in trial_batches(batches_of(8, 8))] == [6, 2]
    assert [len(b.ids) for b in trial_batches(batches_of(2, 2))] == [1, 1]
    for samples, tried in ((20, 16), (31, 16), (60, 32), (100, 56), (128, 64), (500, 64)):
        assert sum(len(b.ids) for b in trial_batches(batches_of(samples, 8))) == tried
    with pytest.raises(ArgumentError, match="2 calibration samples or more, got 1"):
        trial_batches(batches_of(1, 1))


def test_what_a_trial_needs_is_said_before_the_scoring(
    llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfprune_fast.pruning.oneshot.open_model", None)
    with pytest.raises(ArgumentError, match="got 1 in all; give more --samples, or --allocation"):
        hf.oneshot(llama_dir, text_file, tmp_path / "out", prune_ratio=0.5, samples=1, seq_len=16)


def test_windows_of_one_token_can_be_compared(
    llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """They have no perplexity, which a choice of the allocation does not need."""
    made = hf.oneshot(
        llama_dir, text_file, tmp_path / "out", prune_ratio=0.5, samples=16, seq_len=1, device="cpu"
    )
    assert all(nats > 0 for nats in made["allocations_kl_nats"].values())


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_checkpoint_is_refitted_as_it_is_stored(
    offload: str, save_checkpoint: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """A base model in bfloat16, run in float32: its own names, its own dtype."""
    folder = save_checkpoint(random_llama(tied=True).to(torch.bfloat16).model)
    sampling: dict[str, Any] = {"samples": 6, "seq_len": 40}
    record = oneshot_record(
        folder, text_file, tmp_path / "out", allocation="global", batch_size=2, dtype="float32",
        offload=offload, verify=True, **sampling,
    )  # fmt: skip
    keep = {
        layer: torch.tensor(record["keep"][f"model.layers.{layer}.mlp"])
        for layer in range(len(record["keep"]))
    }
    source = open_source(folder)
    batches = calibrate(text_file, source, CalibrationOptions(**sampling)).split(2)
    with ResidentModel(load_model(source, dtype="float32", device="cpu")) as entered:
        (expected,), _ = refit(entered, batches, [keep])
    written = load_file(tmp_path / "out" / "model.safetensors")
    for layer, weight in expected.weights.items():
        name = f"layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(written[name], weight.to(torch.bfloat16))


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_closest_is_so_by_the_kl_of_checkpoints_that_are_written(
    offload: str, llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The KL in the record is that of the refitted checkpoint on the held-out sequences."""
    options: dict[str, Any] = {"samples": 20, "seq_len": 40, "batch_size": 5, "device": "cpu"}
    record = oneshot_record(llama_dir, text_file, tmp_path / "out", offload=offload, **options)
    kl_nats = record["chosen"]["allocations_kl_nats"]
    assert kl_nats[str(record["chosen"]["allocation"])] == min(kl_nats.values())
    source = open_source(llama_dir)
    sampling = CalibrationOptions(samples=20, seq_len=40)
    batches = calibrate(text_file, source, sampling).split(5)
    table = hf.score(source, text_file, criterion="fisher", obs=True, **options)
    dense = load_model(source, device="cpu")
    widths = WidthBudget.of(source.spec, Budget(prune_ratio=0.5))
    for allocated, kl in kl_nats.items():
        with ResidentModel(dense) as entered:
            uniform = widths.keep(table.obs, "uniform")
            factors = layer_factors(entered, batches[:3], batches[3:4], uniform, table.obs)
            keep = uniform if allocated == "uniform" else widths.keep(table.obs, "global", factors)
            # Of 20 sequences in fives the last five are held out.
            replace, _ = refit_stored(entered, batches[:3], source, keep)
        out = tmp_path / allocated
        hf.prune_checkpoint(source, out, keep, replace=replace)
        fidelity = hf.evaluate(dense, load_model(out, device="cpu"), [batches[3].ids])
        assert kl == pytest.approx(fidelity.kl_nats, rel=1e-4)  # float32
