"""What a user mistypes, or what does not fit: one line on stderr, exit code 2, nothing lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_llama
from refusals import assert_refused
from safetensors.torch import load_file, save_file

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL

Hfprune = Callable[..., Any]


@pytest.fixture(scope="module")
def scores(one_llama_dir: Path) -> hf.ImportanceTable:
    return hf.score(one_llama_dir, TINY_MODEL / "calibration.txt", samples=2, seq_len=32)


@pytest.fixture
def scores_file(scores: hf.ImportanceTable, tmp_path: Path) -> Path:
    """The scores of `llama_dir`."""
    scores.save(tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prune-ratio", "1.0"], r"prune_ratio must be in \[0, 1\), got 1.0"),
        (["--prune-ratio", "-0.5"], r"prune_ratio must be in"),
        (["--prune-ratio", "much"], r"--prune-ratio.*'much' is not a valid float"),
        (["--param-ratio", "0.99"], r"param_ratio 0.99 cannot be reached"),
        (["--intermediate-size", "97"], r"intermediate_size must be in 1\.\.96"),
        (["--prune-ratio", "0.1", "--param-ratio", "0.1"], "exactly one .*prune_ratio and param_r"),
        ([], "exactly one of prune_ratio, param_ratio, intermediate_size; got none"),
        (["--prune-ratio", "0.1", "--round-to", "128"], "round_to 128 is more than .* 96"),
        (["--prune-ratio", "0.1", "--statistic", "l7"], "'l7' is not one of"),
        (["--prune-ratio", "0.1", "--no-such-flag"], "No such option"),
    ],
)
def test_bad_budget(
    llama_dir: Path,
    scores_file: Path,
    tmp_path: Path,
    hfprune: Hfprune,
    flags: list[str],
    message: str,
) -> None:
    run = hfprune("prune", llama_dir, "--scores", scores_file, "--out", tmp_path / "out", *flags)
    assert_refused(run, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["score", "prune", "evaluate", "plan"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("no folder", "no model folder"),
        ("a file", "is a file"),
        ("no config", "has no config.json"),
        ("other architecture", "BertModel is not supported.*llama, mistral, qwen2, qwen3"),
        ("quantised", "quantised"),
        ("only bin", "only pickled weights"),
        ("missing shard", "lacks the shard model-00002"),
        ("truncated shard", "model-00002.* is truncated"),
        ("missing tensor", "lacks the tensor model.layers.0.mlp.up_proj.weight"),
        ("nan weight", "tensor model.layers.0.mlp.up_proj.weight holds NaN"),
    ],
)
def test_bad_model(
    save_checkpoint: Callable[..., Path], llama_dir: Path, text_file: Path, tmp_path: Path,
    hfprune: Hfprune, command: str, break_it: str, message: str,
) -> None:  # fmt: skip
    folder = llama_dir
    if "shard" in break_it:
        folder = save_checkpoint(random_llama(), "broken", max_shard_size="200KB")
    weights = folder / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    config = json.loads((folder / "config.json").read_text())
    if break_it == "no folder":
        folder = tmp_path / "nowhere"
    elif break_it == "a file":
        folder = text_file
    elif break_it == "no config":
        (folder / "config.json").unlink()
    elif break_it == "other architecture":
        config |= {"model_type": "bert", "architectures": ["BertModel"]}
        (folder / "config.json").write_text(json.dumps(config))
    elif break_it == "quantised":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    elif break_it == "only bin":
        weights.rename(folder / "pytorch_model.bin")
    elif break_it == "missing shard":
        next(folder.glob("model-00002*")).unlink()
    elif break_it == "truncated shard":
        path = next(folder.glob("model-00002*"))
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        if break_it == "missing tensor":
            del tensors[name]
        else:
            tensors[name][0, 0] = torch.nan
        save_file(tensors, weights, {"format": "pt"})
    running = ["--samples", 2, "--seq-len", 32]
    arguments = {
        "score": ["score", folder, "--calibration", text_file, "--out", tmp_path / "s", *running],
        "prune": ["prune", folder, "--calibration", text_file, "--prune-ratio", 0.1, "--out",
                  tmp_path / "out", *running],
        "evaluate": ["evaluate", TINY_MODEL, folder, "--text", text_file, *running],
        "plan": ["plan", folder, "--prune-ratio", 0.1],
    }  # fmt: skip
    from_config_alone = {
        "only bin",
        "missing shard",
        "truncated shard",
        "missing tensor",
        "nan weight",
    }
    run = hfprune(*arguments[command])
    if command == "plan" and break_it in from_config_alone:
        assert run.code == 0  # plan does not open the weights
    else:
        assert_refused(run, message)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        ("", "holds no text"),
        ("too short", "one sample takes 32; give more text or a smaller --seq-len"),
        (np.array([[1, -2]]), r"token id -2; expected 0\.\."),
        (np.array([[1.5, 2.5]]), "integer token ids"),
        (np.array([[1, 10**6]]), "token id 1000000; expected"),
    ],
)
@pytest.mark.parametrize("command", ["score", "prune", "evaluate"])
def test_bad_text(
    llama_dir: Path, tmp_path: Path, hfprune: Hfprune, command: str, content: Any, message: str
) -> None:
    source = tmp_path / "source.txt"
    running = ["--seq-len", 32]
    if isinstance(content, str):
        source.write_text(content)
    elif content is not None:
        source = tmp_path / "source.npy"
        np.save(source, content)
        running = []
    arguments = {
        "score": ["score", llama_dir, "--calibration", source, "--out", tmp_path / "s"],
        "prune": ["prune", llama_dir, "--calibration", source, "--prune-ratio", 0.1, "--out",
                  tmp_path / "out"],
        "evaluate": ["evaluate", llama_dir, llama_dir, "--text", source],
    }  # fmt: skip
    assert_refused(hfprune(*arguments[command], *running), message)


def test_bad_scores_file(
    llama_dir: Path, scores_file: Path, tmp_path: Path, hfprune: Hfprune
) -> None:
    arguments = ["prune", llama_dir, "--prune-ratio", 0.1, "--out", tmp_path / "out", "--scores"]
    assert_refused(hfprune(*arguments, tmp_path / "nowhere"), "no scores file")
    assert_refused(hfprune(*arguments, llama_dir / "config.json"), "not a scores file")
    assert_refused(hfprune(*arguments, llama_dir / "model.safetensors"), "holds no scores")
    other = ["prune", "demo", "--prune-ratio", 0.1, "--out", tmp_path / "out", "--scores"]
    assert_refused(hfprune(*other, scores_file), "of another model")
    assert_refused(hfprune(*arguments[:-1]), "give --calibration SOURCE, or --scores FILE, or both")


def test_output_exists(
    llama_dir: Path, scores_file: Path, tmp_path: Path, hfprune: Hfprune
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", llama_dir, "--scores", scores_file, "--prune-ratio", 0.1, "--out", out]
    assert hfprune(*arguments).code == 0
    assert_refused(hfprune(*arguments), "exists and is not empty; --force")
    assert hfprune(*arguments, "--force").code == 0
    scoring = ["score", llama_dir, "--calibration", "demo", "--out", scores_file]
    assert_refused(hfprune(*scoring), "exists; --force")


def test_score_never_overwrites_its_inputs(
    llama_dir: Path, text_file: Path, hfprune: Hfprune
) -> None:
    weights, text = (llama_dir / "model.safetensors").read_bytes(), text_file.read_bytes()
    for out in (llama_dir / "model.safetensors", llama_dir / "new", text_file):
        run = hfprune("score", llama_dir, "--calibration", text_file, "--out", out, "--force")
        assert_refused(run, "which is never written to")
    assert (llama_dir / "model.safetensors").read_bytes() == weights
    assert text_file.read_bytes() == text
    assert not (llama_dir / "new").exists()


def test_what_the_system_refuses_is_one_line(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/locked/config.json")

    monkeypatch.setattr("hfprune_fast.commands.plan.run", locked)
    assert_refused(hfprune("plan", "demo", "--prune-ratio", 0.1), "Permission denied: '/locked/con")


@pytest.mark.parametrize("error", [MemoryError("too much"), torch.OutOfMemoryError("CUDA: no")])
def test_out_of_memory_says_what_to_do(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune,
    monkeypatch: pytest.MonkeyPatch, error: Exception,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("hfprune_fast.scoring.passes.Pass.add_to", full)
    run = hfprune("score", llama_dir, "--calibration", text_file, "--out", tmp_path / "s")
    assert_refused(run, "out of memory with one sequence at a time; try a smaller --seq-len")


def test_activations_that_overflow_are_reported_on_the_last_line(
    save_checkpoint: Callable[..., Path], text_file: Path, tmp_path: Path, hfprune: Hfprune
) -> None:
    model = random_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
    run = hfprune(
        "score", save_checkpoint(model), "--calibration", text_file, "--out", tmp_path / "s"
    )
    assert_refused(run, "NaN or inf in the MLP activations of layer 1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", 0], "batch_size must be at least 1"),
        (["--samples", 0], "samples must be at least 1"),
        (["--seq-len", 0], "seq_len must be at least 1"),
        (["--seq-len", 10**6], "seq_len must be at most 128"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--dtype", "float8"], "'float8' is not one of"),
    ],
)
@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_bad_running_flags(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune, command: str,
    flags: list[Any], message: str,
) -> None:  # fmt: skip
    arguments = {
        "score": ["score", llama_dir, "--calibration", text_file, "--out", tmp_path / "s"],
        "evaluate": ["evaluate", llama_dir, llama_dir, "--text", text_file],
    }
    assert_refused(hfprune(*arguments[command], *flags), message)


@pytest.mark.parametrize("place", ["", "sub", ".."])
def test_output_overlaps_source(
    llama_dir: Path, scores_file: Path, hfprune: Hfprune, place: str
) -> None:
    run = hfprune(
        "prune", llama_dir, "--scores", scores_file, "--prune-ratio", 0.1, "--force",
        "--out", llama_dir / place,
    )  # fmt: skip
    assert_refused(run, "which is never written to")


def test_refusals_come_before_the_scoring(
    llama_dir: Path, tmp_path: Path, hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hfprune_fast.pruning.oneshot.ScoringJob", lambda *_, **__: pytest.fail("scored")
    )
    arguments = ["prune", llama_dir, "--calibration", "demo", "--prune-ratio"]
    for flags, message in (
        (["2"], "prune_ratio"),
        (["0.2", "--protect", "3"], r"protect names layer 3; the model has 0\.\.2"),
        (["0.2", "--protect", "0,1,2"], "protect names every layer"),
        (["0.2", "--min-keep", "1.5"], "min_keep must be in"),
        (["0.2", "--layout", "native"], "layout native: .*; use layout custom or padded"),
        (["0.2", "--criterion", "random", "--resume"], "nothing that could be resumed"),
    ):
        assert_refused(hfprune(*arguments, *flags, "--out", tmp_path / "out"), message)
    assert_refused(hfprune(*arguments, "0.2", "--out", llama_dir), "never written")
