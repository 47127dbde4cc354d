"""The whole job: what is opened and refitted, from which scores, and what is refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hfprune_fast as hf
from hfprune_fast.checkpoint import source as source_module
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.data import calibration as calibration_module
from hfprune_fast.engine import streaming


def test_few_tokens_to_refit_to_are_reported(
    llama_dir: Path, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for samples in (24, 23):  # 8 tokens for each of 96 neurons are 768
        out = tmp_path / str(samples)
        hf.oneshot(llama_dir, text_file, out, prune_ratio=0.5, samples=samples, seq_len=32)
    said = "hfprune: 736 calibration tokens are few to refit 96 neurons a layer; 3072 bring"
    lines = [line for line in capfd.readouterr().err.splitlines() if "tokens are few" in line]
    assert [line[: len(said)] for line in lines] == [said]


@pytest.mark.parametrize(
    ("preset", "samples", "drawn"),
    [("default", None, 384), ("default", 130, 130), ("paper", None, 128)],
)
def test_a_refit_draws_32_tokens_for_each_neuron(
    preset: str, samples: int | None, drawn: int, llama_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text((TINY_MODEL / "calibration.txt").read_text()[:20_000])
    out = tmp_path / "out"
    hf.oneshot(
        llama_dir, text, out, recipe=preset, prune_ratio=0.5, samples=samples, seq_len=8,
        device="cpu",
    )  # fmt: skip
    # 32 tokens for each of 96 neurons are 3072.
    assert json.loads((out / "hfprune.json").read_text())["provenance"]["samples"] == drawn


@pytest.mark.parametrize("refit", ["linear", "reconstruct"])
def test_where_nothing_is_removed_the_weights_stay(refit: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": 8, "seq_len": 32, "dtype": "bfloat16", "device": "cpu"}
    hf.oneshot("demo", "demo", tmp_path / "out", prune_ratio=0.0, refit=refit, **options)
    before, after = (load_file(f / "model.safetensors") for f in (TINY_MODEL, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_whole_job_opens_tokenises_and_loads_once(
    llama_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, with scoring, removal costs, two allocations and a refit."""
    calls = Counter[str]()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    counted(source_module, "read_config")
    counted(source_module, "SafetensorsFile")
    counted(source_module, "load_tokenizer")
    counted(source_module, "fingerprint_of")
    counted(calibration_module, "token_windows")
    counted(streaming, "build")
    options: dict[str, Any] = {"samples": 20, "seq_len": 40, "device": "cpu"}
    hf.oneshot(llama_dir, text_file, tmp_path / "out", prune_ratio=0.5, **options)
    assert calls == dict.fromkeys(calls, 1)
    assert len(calls) == 6


def test_the_default_recipe_on_the_command_line(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    """Chosen, refitted and written; and the same from scores that were made before."""
    running = ["--calibration", "demo", "--samples", 60, "--seq-len", 64, "--device", "cpu"]
    budget = ["--prune-ratio", 0.3, "--json"]
    once = hfprune("prune", llama_dir, *running, *budget, "--out", tmp_path / "once", "--verify")
    assert once.code == 0, once.err
    result = once.json()
    assert (result["criterion"], result["select"], result["refit"]) == ("fisher", "obs", "linear")
    assert result["allocation"] in ("uniform", "measured")
    record = json.loads((tmp_path / "once" / "hfprune.json").read_text())
    assert record["chosen"]["allocations_kl_nats"].keys() == {"uniform", "measured"}
    card = (tmp_path / "once" / "README.md").read_text()
    assert "| ranked by | what a removal costs when the others are refitted" in card
    assert "| down_proj | refitted to the dense model by least squares |" in card
    scores = ["score", llama_dir, *running, "--criterion", "fisher", "--obs"]
    assert hfprune(*scores, "--out", tmp_path / "scores").code == 0
    again = hfprune(
        "prune", llama_dir, *running, *budget, "--out", tmp_path / "again", "--scores",
        tmp_path / "scores",
    )  # fmt: skip
    assert again.code == 0, again.err
    for name in ("model.safetensors", "config.json"):
        first, second = (tmp_path / run / name for run in ("once", "again"))
        assert first.read_bytes() == second.read_bytes()
    plain = hfprune(
        "prune", llama_dir, *budget[:2], "--out", tmp_path / "plain", "--scores",
        tmp_path / "scores", "--allocation", "global", "--layout", "custom",
    )  # fmt: skip
    assert plain.code == 0, plain.err
    assert "nothing was refitted" in plain.err
    assert "loads with transformers after `import hfprune_fast`" in plain.out
    fidelity = [
        hfprune(
            "evaluate", llama_dir, tmp_path / run, "--text", text_file, "--seq-len", 32, "--json"
        )
        for run in ("once", "plain")
    ]
    assert fidelity[0].json()["kl_nats"] < fidelity[1].json()["kl_nats"]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_baselines_need_no_text(
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
            mlp = model.get_submodule(layer)
            weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()]
            norms = torch.cat(weights, dim=1).double().norm(dim=1)
            assert kept == norms.sort(descending=True).indices[:48].sort().values.tolist()
    else:
        assert len(set(map(tuple, keep.values()))) == len(keep)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--refit", "linear"], "refit linear needs --calibration"),
        (["--allocation", "measured"], "allocation measured needs --calibration, the text"),
        (["--criterion", "fisher"], "by entropy, not by fisher; score again"),
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
        "prune", llama_dir, "--scores", scores, "--prune-ratio", 0.5, "--out", tmp_path / "o",
        *flags,
    )  # fmt: skip
    assert run.code == 2
    assert message in run.err
    assert run.err.count("\n") == 1
    assert not (tmp_path / "o").exists()
