"""What a user types: commands one after the other, what they say, doctor and help."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfprune_fast as hf
from hfprune_fast import cli
from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.commands import doctor
from hfprune_fast.errors import CheckpointError
from hfprune_fast.kernels import CPP_INSTRUCTIONS, _dispatch

Hfprune = Callable[..., Any]


def test_score_prune_evaluate_in_json(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune
) -> None:
    scores, out = tmp_path / "s", tmp_path / "out"
    running = ["--samples", 3, "--seq-len", 32, "--batch-size", 2, "--json"]
    scored = hfprune("score", llama_dir, "--calibration", text_file, "--out", scores, *running)
    assert scored.code == 0, scored.err
    assert scored.json()["provenance"]["samples"] == 3
    assert "scoring" in scored.err  # the progress bar
    pruned = hfprune(
        "prune", llama_dir, "--scores", scores, "--param-ratio", 0.05, "--out", out, "--json",
        "--statistic", "l2", "--round-to", 4,
    )  # fmt: skip
    assert pruned.code == 0, pruned.err
    result = pruned.json()
    assert result["intermediate_size"] % 4 == 0
    assert result["statistic"] == "l2"
    record = json.loads((out / "hfprune.json").read_text())
    assert record["requested"] == {
        "param_ratio": 0.05,
        "round_to": 4,
        "min_keep": 0.05,
        "protect": [],
        "layout": "auto",
        "criterion": "entropy",
        "select": "statistic",
        "statistic": "l2",
        "allocation": "uniform",
        "refit": "none",
    }
    assert record["provenance"]["samples"] == 3
    card = (out / "README.md").read_text()
    assert f"{result['intermediate_size']} of 96" in card
    evaluated = hfprune(
        "evaluate", llama_dir, out, "--text", text_file, "--seq-len", 32, "--samples", 4, "--json"
    )
    assert evaluated.code == 0, evaluated.err
    assert evaluated.json()["kl_nats"] > 0
    assert evaluated.json()["tokens"] == 128


def test_prune_by_calibration_is_score_then_prune(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune
) -> None:
    running = ["--calibration", text_file, "--samples", 3, "--seq-len", 32]
    hfprune("score", llama_dir, *running, "--out", tmp_path / "s")
    hfprune(
        "prune", llama_dir, "--scores", tmp_path / "s", "--prune-ratio", 0.3, "--preset", "paper",
        "--out", tmp_path / "a",
    )  # fmt: skip
    run = hfprune(
        "prune", llama_dir, *running, "--prune-ratio", 0.3, "--preset", "paper",
        "--out", tmp_path / "b",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "intermediate_size 96 -> 64" in run.out
    assert "33.3% of the neurons are removed, 30.0% were requested" in run.err
    for name in ("model.safetensors", "hfprune.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_says_how_many_samples_the_text_made(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune
) -> None:
    run = hfprune(
        "score", llama_dir, "--calibration", text_file, "--seq-len", 128, "--samples", 10**6,
        "--out", tmp_path / "s", "--json",
    )  # fmt: skip
    made = run.json()["provenance"]["samples"]
    assert re.search(rf"holds {made} samples of 128 tokens, fewer than 1000000", run.err)


def test_plan(llama_dir: Path, hfprune: Hfprune) -> None:
    run = hfprune("plan", llama_dir, "--intermediate-size", 48)
    assert run.code == 0, run.err
    assert re.search(r"MLP neurons a layer +96 +48 +50.00%", run.out)


def test_plan_needs_no_weights(llama_dir: Path, hfprune: Hfprune) -> None:
    (llama_dir / "model.safetensors").unlink()
    assert hfprune("plan", llama_dir, "--prune-ratio", 0.1).code == 0


def test_a_folder_called_demo_does_not_change_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    scored: list[Any] = []

    def score(source: Any, text: Any, **_: Any) -> None:
        scored.extend([source.folder, text])
        raise KeyboardInterrupt

    monkeypatch.setattr("hfprune_fast.commands.demo.score", score)
    with pytest.raises(SystemExit):
        cli.main(["demo"])
    assert scored == [TINY_MODEL, TINY_MODEL / "calibration.txt"]


def test_the_next_command_after_scoring_works(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune
) -> None:
    run = hfprune(
        "score", llama_dir, "--calibration", text_file, "--out", tmp_path / "s", "--samples", 4,
        "--seq-len", 32, "--criterion", "entropy", "--criterion", "fisher", "--obs",
    )  # fmt: skip
    program, *command = run.out.splitlines()[-1].removeprefix("next: ").split()
    assert program == "hfprune"
    pruned = hfprune(*command[:-1], tmp_path / "out", "--allocation", "global", "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json()["select"] == "obs"  # of several, the criterion that has removal costs
    assert json.loads((tmp_path / "out/hfprune.json").read_text())["requested"]["refit"] == "linear"
    again = hfprune(
        "score", tmp_path / "out", "--calibration", text_file, "--out", tmp_path / "s2",
        "--samples", 4, "--seq-len", 32,
    )  # fmt: skip
    program, *command = again.out.splitlines()[-1].removeprefix("next: ").split()
    twice = hfprune(*command[:-1], tmp_path / "twice", "--json")
    assert twice.code == 0, twice.err
    assert twice.json()["dense_mlp_widths"] == pruned.json()["mlp_widths"]


def test_doctor_says_what_will_be_used(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = hfprune("doctor", "--json").json()
    assert found["moving_weights"] == native.description()
    assert found["torch"] == torch.__version__
    assert found["disk_free_bytes"] > 0
    if not torch.cuda.is_available() and CPP_INSTRUCTIONS:
        assert found["scoring_kernels"].lower() == f"cpp ({CPP_INSTRUCTIONS[0]})"
    assert (found["device"] == "cuda") == bool(found["gpus"]) == torch.cuda.is_available()
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "UNUSED_REASON", "no compiler")
    for module in (doctor, _dispatch):
        monkeypatch.setattr(module, "CPP_INSTRUCTIONS", ())
        monkeypatch.setattr(module, "CPP_UNUSED_REASON", "no compiler")
    if not torch.cuda.is_available():
        slower = "torch, slower: the C++ extension is not in use (no compiler)"
        assert hfprune("doctor", "--json").json()["scoring_kernels"] == slower
    monkeypatch.setenv("HFPRUNE_BACKEND", "nonsense")
    run = hfprune("doctor")
    assert run.code == 0
    assert re.search(r"moving weights +plain torch, slower: .*no compiler", run.out)
    assert "transformers builds no family by per_layer_config; others take layout " in run.out
    assert re.search(r"scoring kernels +HFPRUNE_BACKEND must be one of", run.out)
    assert re.search(r"disk free +\d", run.out)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        cli.main(["plan", str(tmp_path / "nowhere"), "--prune-ratio", "0.1", "--debug"])


def test_help_and_version(hfprune: Hfprune) -> None:
    assert "Score the MLP neurons" in hfprune("--help").out
    assert hfprune().code == 0
    assert hf.__version__ in hfprune("--version").out
    for command in ("score", "prune", "evaluate", "plan", "demo", "doctor"):
        run = hfprune(command, "--help")
        assert run.code == 0
        assert "Usage: hfprune " + command in run.out
