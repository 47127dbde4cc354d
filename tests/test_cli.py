"""What a user types, and above all mistypes: one line on stderr, exit code 2, nothing lost."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file, save_file

import hfprune_fast as hf
from hfprune_fast import cli
from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.commands import doctor
from hfprune_fast.errors import CheckpointError
from hfprune_fast.kernels import CPP_INSTRUCTIONS, _dispatch

Hfprune = Callable[..., Any]


@pytest.fixture
def scores_file(llama_dir: Path, text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    hf.score(llama_dir, text_file, samples=2, seq_len=32).save(path)
    return path


def assert_refused(run: Any, message: str) -> None:
    assert run.code == 2, run.err
    lines = re.split(r"[\r\n]+", run.err.strip())
    assert lines[-1].startswith("hfprune: error: ")
    assert re.search(message, lines[-1]), lines[-1]
    # Nothing else is there but progress bars and what was said before.
    bars = re.compile(
        r"\s*(Writing model shards: |scoring: |removal costs: |allocating: |refitting: |"
        r"evaluating: |writing: |verifying: |hfprune: |$)"
    )
    assert all(bars.match(line) for line in lines), run.err
    assert run.out == ""


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
    assert re.search(rf"holds {made} samples of 128 tokens; 1000000 were requested", run.err)


def test_plan(llama_dir: Path, hfprune: Hfprune) -> None:
    run = hfprune("plan", llama_dir, "--intermediate-size", 48)
    assert run.code == 0, run.err
    assert re.search(r"MLP neurons a layer +96 +48 +50.00%", run.out)


def test_plan_needs_no_weights(llama_dir: Path, hfprune: Hfprune) -> None:
    (llama_dir / "model.safetensors").unlink()
    assert hfprune("plan", llama_dir, "--prune-ratio", 0.1).code == 0


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
    save_checkpoint: Callable[..., Path], scores_file: Path, text_file: Path, tmp_path: Path,
    hfprune: Hfprune, command: str, break_it: str, message: str,
) -> None:  # fmt: skip
    shards = {"max_shard_size": "200KB"} if "shard" in break_it else {}
    folder = save_checkpoint(random_llama(), "broken", **shards)
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


def test_scores_survive_an_output_that_fails(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfprune_fast.checkpoint.writer.SafetensorsWriter", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = hfprune(
        "prune", llama_dir, "--calibration", text_file, "--samples", 2, "--seq-len", 32,
        "--prune-ratio", 0.1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(run, "No space left on device")
    kept = re.search(r"the scores are saved in (.*)", run.err)[1]  # type: ignore[index]
    assert hf.ImportanceTable.load(kept).l1.shape == (3, 96)
    assert not (tmp_path / "out").exists()


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


PRUNE_DEMO = ["prune", "demo", "--calibration", "demo", "--samples", "32", "--prune-ratio", "0.2"]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_while_scoring_leaves_nothing(
    tmp_path: Path, how: signal.Signals, code: int
) -> None:
    def heed_signals() -> None:  # a job in the background inherits that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "hfprune_fast", *PRUNE_DEMO, "--out", "out"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=heed_signals
    ) as process:
        assert process.stderr is not None
        seen = ""
        while "scoring:" not in seen:
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        time.sleep(0.2)  # the bar is being made
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    said = "interrupted" if how == signal.SIGINT else "terminated"
    assert f"hfprune: {said}; no unfinished output is left" in err.splitlines()
    assert {path.name for path in tmp_path.iterdir()} <= {"out.state"}


def test_sigkill_while_writing_leaves_no_output(tmp_path: Path, hfprune: Hfprune) -> None:
    """Killed when weights and config are written and the tokenizer is about to be copied."""
    code = """
import os, shutil, signal, sys
from hfprune_fast.cli import main
shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
    arguments = ["prune", "demo", "--criterion", "magnitude", "--prune-ratio", "0.2", "--out"]
    command = [sys.executable, "-c", code, *arguments, "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".out.partial-")
    assert (leftover / "model.safetensors").exists()
    again = hfprune(*arguments, tmp_path / "out")  # the next run says so, and works
    assert again.code == 0, again.err
    assert f"{leftover} is left over from a run that was killed" in again.err
