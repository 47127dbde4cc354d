"""Who gets how many neurons, and scoring in steps."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from torch import Tensor
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.config import Recipe
from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import ArgumentError
from hfprune_fast.pruning import allocation, selection
from hfprune_fast.pruning.allocation import (
    Cut,
    Fitting,
    allocate,
    held_out_kl,
    score_in_steps,
    trial,
)
from hfprune_fast.pruning.refit import refit


def batches_of(samples: int, at_once: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(127, (samples, 20), generator=generator)
    return numbered(MicroBatch(part, (20,) * len(part)) for part in ids.split(at_once))


class Knowing:
    """Stands for a Fitting: says which keep is closest."""

    def __init__(self, kl: list[float]) -> None:
        self.kl, self.keeps = kl, []

    def closest(self, keeps: list[Any]) -> tuple[int, list[float]]:
        self.keeps = keeps
        return self.kl.index(min(self.kl)), self.kl


@pytest.mark.parametrize(("kl", "chosen"), [([1, 2, 3], 0.0), ([3, 1, 2], 0.5), ([3, 2, 1], 1.0)])
def test_auto_takes_the_closest(kl: list[float], chosen: float) -> None:
    importance = torch.rand(3, 40, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [5.0]])
    knowing = Knowing(kl)
    keep, told = allocate(importance, Cut(20), Recipe(), knowing)  # type: ignore[arg-type]
    expected = selection.keep_top(importance, 20, chosen)
    assert all(torch.equal(keep[layer], expected[layer]) for layer in expected)
    assert told["allocation"] == chosen
    assert list(told["allocations_kl_nats"].values()) == kl
    with pytest.raises(ArgumentError, match="allocation auto needs --calibration"):
        allocate(importance, Cut(20), Recipe(), None)


def test_what_allocations_are_told_by_is_the_pruned_models_kl() -> None:
    model = tiny_model("llama")
    batches = batches_of(8, 2)
    importance = torch.rand(3, 96, dtype=torch.float64)
    keeps = [selection.keep_top(importance, 48, share) for share in (0.0, 1.0)]
    with ResidentModel(model) as entered:
        got = held_out_kl(entered, batches, keeps)
        fitted, _ = refit(entered, batches[:3], keeps)
    for kl, keep, result in zip(got, keeps, fitted, strict=True):
        cut = copy.deepcopy(model)
        hf.prune(cut, keep)
        for layer, weight in result.weights.items():
            cut.model.layers[layer].mlp.down_proj.weight.copy_(weight)
        assert kl == pytest.approx(hf.evaluate(model, cut, [batches[3].ids]).kl_nats, rel=1e-6)


def test_a_trial_has_something_to_hold_out() -> None:
    assert [len(b.ids) for b in trial(batches_of(8, 8))] == [6, 2]
    assert [len(b.ids) for b in trial(batches_of(2, 2))] == [1, 1]
    assert sum(len(b.ids) for b in trial(batches_of(100, 8))) == 64
    with pytest.raises(ArgumentError, match="2 calibration samples or more, got 1"):
        trial(batches_of(1, 1))


def test_in_steps_what_is_gone_stays_gone(
    llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[dict[int, Tensor]] = []
    write = allocation._write_zeroed

    def note(model: Any, out: Path, keep: dict[int, Tensor], fitting: Any) -> None:
        removed.append(keep)
        write(model, out, keep, fitting)

    monkeypatch.setattr(allocation, "_write_zeroed", note)
    how: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu"}
    table = score_in_steps(llama_dir, text_file, Recipe(steps=3), Cut(30), tmp_path, **how)
    assert [sum(map(len, keep.values())) for keep in removed] == [3 * 74, 3 * 52]
    for before, after in zip(
        removed, [*removed[1:], selection.keep_top(table.obs, 30, 1.0)], strict=True
    ):
        for layer, kept in after.items():
            assert set(kept.tolist()) <= set(before[layer].tolist())
    assert list(tmp_path.glob(".hfprune-step-*")) == []
    assert table.provenance["step"] == 3
    # It still counts as scores of the dense model, which will be cut.
    dense = hf.score(llama_dir, text_file, **how)
    assert table.provenance["model_fingerprint"] == dense.provenance["model_fingerprint"]


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_checkpoint_is_fitted_as_it_is_stored(
    offload: str, save_checkpoint: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """A base model in bfloat16, run in float32: its own names, its own dtype."""
    model = random_llama(tied=True).to(torch.bfloat16)
    folder = save_checkpoint(model.model)
    fitting = Fitting(
        folder, text_file, samples=6, seq_len=40, device="cpu", dtype="float32", offload=offload
    )
    keep = selection.keep_top(torch.rand(3, 96, dtype=torch.float64), 40, "global")
    replaced = fitting.refit(keep)
    with ResidentModel(load_model(folder, dtype="float32", device="cpu")) as entered:
        (expected,), _ = refit(entered, fitting.batches, [keep])
    for layer, kept in keep.items():
        weight = replaced.pop(f"layers.{layer}.mlp.down_proj.weight")
        assert weight.shape == (64, len(kept))
        assert torch.equal(weight, expected.weights[layer].to(torch.bfloat16))
    assert not replaced
    hf.prune_checkpoint(folder, tmp_path / "out", keep, replace=fitting.refit(keep), verify=True)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_closest_is_so_by_the_kl_of_checkpoints_that_are_written(
    offload: str, llama_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"seq_len": 40, "device": "cpu"}
    fitting = Fitting(llama_dir, text_file, samples=20, batch_size=5, offload=offload, **options)
    importance = torch.rand(3, 96, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [9.0]])
    keeps = [selection.keep_top(importance, width, 1.0) for width in (60, 30, 80)]
    best, kl = fitting.closest(keeps)
    assert best == 2
    # Of 20 sequences in fives the last five are held out.
    told = Fitting(llama_dir, text_file, samples=20, batch_size=5, **options)
    held_out = told.batches.pop().ids
    dense = load_model(llama_dir, device="cpu")
    for i, keep in enumerate(keeps):
        out = tmp_path / str(i)
        hf.prune_checkpoint(llama_dir, out, keep, replace=told.refit(keep))
        fidelity = hf.evaluate(dense, load_model(out, device="cpu"), [held_out])
        assert kl[i] == pytest.approx(fidelity.kl_nats, rel=1e-4)  # float32


def test_few_tokens_to_fit_to_are_told(
    llama_dir: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for samples in (24, 23):  # 8 tokens for each of 96 neurons are 768
        Fitting(llama_dir, text_file, samples=samples, seq_len=32, device="cpu")
    said = "hfprune: 736 calibration tokens are few to refit 96 neurons a layer; 768 or more"
    assert [line[: len(said)] for line in capfd.readouterr().err.splitlines()] == [said]


@pytest.mark.parametrize("refits", [True, False])
def test_the_model_between_two_steps_is_dense_but_for_zeros(
    refits: bool, llama_dir: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    how: dict[str, Any] = {"samples": 30, "seq_len": 32, "device": "cpu", "seed": 4}
    asked: dict[str, Any] = {**how, "state_file": tmp_path / "state", "resume": False}
    calls: list[dict[str, Any]] = []
    between: list[Any] = []

    def note(model: Path, source: Path, **options: Any) -> hf.ImportanceTable:
        calls.append(options)
        between.append(load_model(model, device="cpu"))
        return hf.score(model, source, **options)

    monkeypatch.setattr(allocation, "score", note)
    recipe = Recipe(allocation="global", refit=refits, steps=2)
    table = score_in_steps(llama_dir, text_file, recipe, Cut(40, round_to=8), tmp_path, **asked)
    # Only the first step has a state to go on from: the second's model is gone when it is asked.
    assert calls[0] == {**asked, "criterion": "fisher", "obs": True}
    assert calls[1] == {**calls[0], "state_file": None}
    first = hf.score(llama_dir, text_file, criterion="fisher", obs=True, **how)
    # Half of the way, and no multiple of 8: widths are rounded at the end alone.
    keep = hf.select(first, intermediate_size=68, statistic="obs", allocation="global")
    dense, zeroed = between
    fitted = Fitting(llama_dir, text_file, **how).refit(keep)
    for name, weight in dense.state_dict().items():
        got = zeroed.state_dict()[name]
        if "down_proj" in name:
            kept = keep[int(name.split(".")[2])]
            assert torch.equal(got[:, kept], fitted[name] if refits else weight[:, kept])
            assert int((got != 0).any(0).sum()) == len(kept)
        else:
            assert torch.equal(got, weight)
    assert bool((table.obs == 0).sum() == 3 * (96 - 68))


def test_a_step_that_fails_leaves_no_model_behind(
    llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()

    def failing(model: Any, *args: Any, **options: Any) -> hf.ImportanceTable:
        if Path(model) == llama_dir:
            return hf.score(model, *args, **options)
        assert list(beside.glob("**/*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(allocation, "score", failing)
    recipe = Recipe("entropy", "statistic", None, "uniform", refit=False, steps=2)
    with pytest.raises(KeyboardInterrupt):
        score_in_steps(llama_dir, text_file, recipe, Cut(30), beside, samples=2, seq_len=16)
    assert list(beside.iterdir()) == []


def test_the_default_recipe_on_the_command_line(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    """Chosen, refitted and written; and the same from scores that were made before."""
    running = ["--calibration", "demo", "--samples", 60, "--seq-len", 64, "--device", "cpu"]
    asked = ["--prune-ratio", 0.3, "--json"]
    once = hfprune("prune", llama_dir, *running, *asked, "--out", tmp_path / "once", "--verify")
    assert once.code == 0, once.err
    result = once.json()
    assert (result["criterion"], result["select"], result["refit"]) == ("fisher", "obs", True)
    assert result["allocation"] in (0.0, 0.5, 1.0)
    record = json.loads((tmp_path / "once" / "hfprune.json").read_text())
    assert record["chosen"]["allocations_kl_nats"].keys() == {"0.0", "0.5", "1.0"}
    scores = ["score", llama_dir, *running, "--criterion", "fisher", "--obs"]
    assert hfprune(*scores, "--out", tmp_path / "scores").code == 0
    again = hfprune(
        "prune", llama_dir, *running, *asked, "--out", tmp_path / "again", "--scores",
        tmp_path / "scores",
    )  # fmt: skip
    assert again.code == 0, again.err
    for name in ("model.safetensors", "config.json"):
        first, second = (tmp_path / run / name for run in ("once", "again"))
        assert first.read_bytes() == second.read_bytes()
    plain = hfprune(
        "prune", llama_dir, *asked, "--out", tmp_path / "plain", "--scores", tmp_path / "scores",
        "--allocation", "global",
    )  # fmt: skip
    assert plain.code == 0, plain.err
    assert "nothing was refitted" in plain.err
    fidelity = [
        hfprune(
            "evaluate", llama_dir, tmp_path / run, "--text", text_file, "--seq-len", 32, "--json"
        )
        for run in ("once", "plain")
    ]
    assert fidelity[0].json()["kl_nats"] < fidelity[1].json()["kl_nats"]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_yardsticks_need_no_text(
    criterion: str, llama_dir: Path, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    run = hfprune(
        "prune", llama_dir, "--prune-ratio", 0.5, "--criterion", criterion, "--seed", 3,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    keep = json.loads((tmp_path / "out" / "hfprune.json").read_text())["keep"]
    model = load_model(llama_dir, device="cpu")
    if criterion == "magnitude":
        for layer, kept in keep.items():
            mlp = model.model.layers[int(layer)].mlp
            weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()]
            norms = torch.cat(weights, dim=1).double().norm(dim=1)
            assert kept == norms.sort(descending=True).indices[:48].sort().values.tolist()
    else:
        assert len(set(map(tuple, keep.values()))) == len(keep)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--refit"], "--refit needs --calibration"),
        (["--criterion", "fisher"], "by entropy, not by fisher; score again"),
        (["--steps", "2"], "--steps scores again and again"),
        (["--criterion", "random"], "criterion random takes no --scores"),
        (["--protect", "0,x"], "protect must be layers such as 0,1,31, got '0,x'"),
        (["--protect", "9"], "protect names layer 9"),
        (["--min-keep", "1.5", "--allocation", "global"], "min_keep must be in"),
        (["--select", "obs"], "select obs needs criterion fisher, got entropy"),
    ],
)
def test_what_scores_alone_cannot_do(
    flags: list[str], message: str, llama_dir: Path, text_file: Path, tmp_path: Path,
    hfprune: Callable[..., Any],
) -> None:  # fmt: skip
    scores = tmp_path / "scores"
    hf.score(llama_dir, text_file, samples=2, seq_len=32).save(scores)
    run = hfprune(
        "prune",
        llama_dir,
        "--scores",
        scores,
        "--prune-ratio",
        0.5,
        "--out",
        tmp_path / "o",
        *flags,
    )
    assert run.code == 2
    assert message in run.err
    assert run.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_padded_is_the_same_model_for_tools_that_know_one_width(
    llama_dir: Path, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    running = ["--calibration", "demo", "--samples", 20, "--seq-len", 64, "--device", "cpu"]
    kl = []
    for layout in ("custom", "padded"):
        out = tmp_path / layout
        run = hfprune(
            "prune", llama_dir, *running, "--prune-ratio", 0.3, "--allocation", "global",
            "--layout", layout, "--out", out, "--verify",
        )  # fmt: skip
        assert run.code == 0, run.err
        assert ("loads with transformers after `import hfprune_fast`" in run.out) == (
            layout == "custom"
        )
        config = json.loads((out / "config.json").read_text())
        assert config["model_type"] == ("hfprune_llama" if layout == "custom" else "llama")
        evaluated = hfprune("evaluate", llama_dir, out, "--text", "demo", "--seq-len", 64, "--json")
        kl.append(evaluated.json()["kl_nats"])
    assert kl[0] == pytest.approx(kl[1], rel=1e-4)  # a product of other widths rounds otherwise


def test_steps_are_for_one_process(
    llama_dir: Path, tmp_path: Path, hfprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    run = hfprune(
        "prune", llama_dir, "--calibration", "demo", "--prune-ratio", 0.3, "--steps", 2,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert run.code == 2
    assert "--steps is for one process" in run.err
