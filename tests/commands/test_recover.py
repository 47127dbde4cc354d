"""hfprune recover: what it prints, and what it refuses in one line before any work."""

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mixtures import change_config
from truth import tiny_model

import hfprune_fast as hf

Hfprune = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pruned(llama_dir: Path, tmp_path: Path) -> Path:
    keep = {layer: torch.arange(48) for layer in range(3)}
    hf.prune_checkpoint(llama_dir, tmp_path / "pruned", keep)
    return tmp_path / "pruned"


def arguments(dense: Path, pruned: Path, text: Path, out: Path, *flags: Any) -> list[Any]:
    return [
        *("recover", dense, pruned, "--text", text, "--out", out, "--seq-len", 16),
        *("--tokens", 320, "--batch-tokens", 64, "--dtype", "float32"),
        *("--learning-rate", 3e-3, *flags),
    ]


def test_what_it_prints(
    hfprune: Hfprune, llama_dir: Path, pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = hfprune(*arguments(llama_dir, pruned, text_file, out, "--json"))
    assert run.code == 0, run.err
    result = run.json()
    assert result["out"] == str(out)
    assert result["kl_after"] < result["kl_before"]
    assert result["held_out"][-1][0] == result["steps"] == 5
    assert "recovering" in run.err  # the bar, with what it watches
    assert re.search(r"tok/s, held-out KL=\d+\.\d{4}, ", run.err), run.err
    run = hfprune(*arguments(llama_dir, pruned, text_file, out, "--force"))
    assert re.match(rf"{out}: held-out KL \d\.\d+ -> \d\.\d+ nats \(\d", run.out)
    assert f"next: hfprune evaluate {llama_dir} {out} --text SOURCE" in run.out
    assert not [line for line in run.err.splitlines() if "Warning" in line]


def assert_refused(run: Any, message: str) -> None:
    assert run.code == 2, run.err
    line = run.err.splitlines()[-1]
    assert line.startswith("hfprune: error: ")
    assert line.isprintable()
    assert re.search(message, line), line
    assert run.out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", 0], "tokens must be at least 1, got 0"),
        (["--lora", -1], "lora must be at least 0, got -1"),
        (["--lora", 0, "--adapter"], "adapter needs lora 1 or more; lora 0 trains the weights"),
        (["--teacher", "resident", "--cache", "c"], "cache is for teacher cached; a resident one"),
        (["--learning-rate", -1], "learning_rate must be in .0, 1e.30., got -1.0"),
        (["--loss", "mse"], "'mse' is not one of 'kl', 'ce', 'kl\\+ce'"),
        (["--dtype", "float16"], "recover does not train in float16; choose --dtype bfloat16"),
        (["--seq-len", 2048], "seq_len must be at most"),
        (["--loss", "ce", "--seq-len", 1], "loss ce needs samples of 2 tokens or more, got 1"),
        (["--learning-rate", "inf"], "learning_rate must be in .0, 1e.30., got inf"),
        (["--lora", 5000], r"lora must be at most the hidden size, \d+, got 5000"),
        (["--adapter", "--verify"], "adapter takes no verify or max_shard_size"),
        (["--cache", "mine"], "mine is not a file of a dense model's hidden states"),
        (["--cache", "out/states"], "cache out/states is or is inside .*out, which the run writes"),
        (["--cache", "out.recovery/x"], "cache out.recovery/x is or is inside .*out.recovery"),
        (["--out", "pruned"], "out pruned is, is inside or is above pruned"),
        (["--cache", "model/x"], "cache model/x is, is inside or is above model"),
        (["--memory-budget", "1KB"], "memory budget 1KB is too small"),
    ],
)
def test_options_that_cannot_be_met(
    hfprune: Hfprune, llama_dir: Path, pruned: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, flags: list[Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text("notes")
    names = llama_dir.relative_to(tmp_path), pruned.relative_to(tmp_path)
    assert_refused(hfprune(*arguments(*names, text_file, Path("out"), *flags)), message)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_shares_the_weights_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(hf.HFPruneError, match=f"shares its steps .* asks for {name}; start it"):
        hf.recover("demo", "demo", "demo", tmp_path / "out")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "False")
    with pytest.raises(hf.HFPruneError, match="one model"):
        hf.recover("demo", "demo", "demo", tmp_path / "out")


def test_processes_of_torchrun_must_be_wanted(
    llama_dir: Path, pruned: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(hf.HFPruneError, match="in one of 2 processes; distributed=True lets all"):
        hf.recover(llama_dir, pruned, text_file, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_models_texts_and_outputs_that_do_not_fit(
    hfprune: Hfprune, llama_dir: Path, pruned: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    other, short, full = tmp_path / "other", tmp_path / "short.txt", tmp_path / "full"
    tiny_model("llama", dtype=torch.float32).save_pretrained(other)
    short.write_text("too little text " * 10)
    full.mkdir()
    (full / "mine").write_text("")
    for dense, source, folder, message in (
        (other, text_file, out, "must share a vocabulary, got 127 and \\d+ ids"),
        (Path("demo"), text_file, out, "must share a hidden size, got 128 and \\d+; recover takes"),
        (pruned, text_file, out, "dense and pruned are one model, pruned: nothing is to recover"),
        (llama_dir, short, out, "short.txt holds \\d samples of 16 tokens, and recovery needs 10"),
        (llama_dir, tmp_path / "none.txt", out, "none.txt"),
        (llama_dir, text_file, full, "full exists and is not empty; --force replaces it"),
        (tmp_path / "gone", text_file, out, "no model folder .*gone"),
    ):
        assert_refused(hfprune(*arguments(dense, pruned, source, folder)), message)
    assert_refused(
        hfprune(*arguments(llama_dir, pruned, text_file, full, "--force")),
        "full holds mine, which hfprune did not write",
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        run = hfprune(*arguments(llama_dir, pruned, text_file, out))
        assert_refused(run, r"recover needs peft and accelerate .*pip install 'hfprune_fast\[rec")
    with pytest.raises(hf.HFPruneError, match=r"dense must be the larger model.*are they swapped"):
        hf.recover(pruned, llama_dir, text_file, out)
    with pytest.raises(hf.HFPruneError, match="text must be a path or the name of a data set"):
        hf.recover(llama_dir, pruned, None, out)  # type: ignore[arg-type]
    for options, message in (
        ({"samples": 4}, "recover takes tokens, not samples"),
        ({"samples": 128}, "recover takes tokens, not samples"),  # the default elsewhere
        ({"layout": "padded"}, "recover takes no layout: it keeps the pruned model's"),
        ({"layout": "auto"}, "recover takes no layout: it keeps the pruned model's"),
    ):
        with pytest.raises(hf.HFPruneError, match=message):
            hf.recover(llama_dir, pruned, text_file, out, **options)
    assert not {"samples", "layout"} & inspect.signature(hf.recover).parameters.keys()
    change_config(pruned, quantization_config={"quant_method": "gptq"})
    assert_refused(hfprune(*arguments(llama_dir, pruned, text_file, out)), "quantised")
    assert not list(tmp_path.glob("out*"))


def test_a_model_of_no_record_is_recovered_too(
    hfprune: Hfprune, llama_dir: Path, pruned: Path, text_file: Path, tmp_path: Path
) -> None:
    (pruned / "hfprune.json").unlink()
    run = hfprune(*arguments(llama_dir, pruned, text_file, tmp_path / "out"))
    assert run.code == 0, run.err
    assert "pruned has no hfprune.json: what was pruned is not known" in run.err
    record = json.loads((tmp_path / "out" / "hfprune.json").read_text())
    assert record["recovery"]["dense"] == "model"
