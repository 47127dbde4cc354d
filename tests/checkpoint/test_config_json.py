"""config.json as text from anywhere: whatever it says costs little, and a mistake is one line."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import HFPruneError

Hfprune = Callable[..., Any]
HUGE = 10**400
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The shipped model in a folder of its own."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text((TINY_MODEL / "config.json").read_text())
    (folder / "model.safetensors").symlink_to(TINY_MODEL / "model.safetensors")
    return folder


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ten million layers": ({"num_hidden_layers": 10**7}, "num_hidden_layers 10000000, expected"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0, expected a positive integer"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers True"),
    "no neurons": ({"intermediate_size": 0}, "intermediate_size 0, expected a positive integer"),
    "neurons a float": ({"intermediate_size": 384.0}, r"intermediate_size 384\.0"),
    "hidden NaN": ({"hidden_size": float("nan")}, "hidden_size nan"),
    "a huge vocabulary": ({"vocab_size": 10**18}, "vocab_size 1000000000000000000"),
    "400 digits": ({"max_position_embeddings": HUGE}, "max_position_embeddings 1000"),
    "wide heads": ({"head_dim": 10**9}, "head_dim 1000000000"),
    "many heads": ({"num_attention_heads": 10**9}, "num_attention_heads 1000000000"),
    "uneven groups": ({"num_key_value_heads": 3}, "num_key_value_heads 3, which does not divide"),
    "dtype a number": ({"dtype": 5}, "dtype 5, expected one of float64, float32"),
    "dtype an object": ({"dtype": {"": "float32"}}, "dtype .*float32.*, expected one of"),
    "dtype no float": ({"dtype": "bool"}, "dtype 'bool', expected one of"),
    "dtype a function": ({"dtype": "load"}, "dtype 'load', expected one of"),
    "nested": ({"x": json.loads("[" * 900 + "]" * 900)}, "nested more than 16 levels deep"),
    "a pad token past the end": (
        {"pad_token_id": 2048},
        "pad_token_id 2048, expected null or less",
    ),
    "rope without end": (
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": HUGE}},
        "json",
    ),
    "a classifier": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "LlamaForSequenceClassification is no causal language model",
    ),
    "widths of another number": (
        {"model_type": "hfprune_llama", "mlp_widths": [1] * 10_000},
        r"MLP width in 1\.\.384 for each of its 4 layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_plan_and_everything_else_refuse(tiny: Path, hfprune: Hfprune, case: str) -> None:
    changes, message = REFUSED[case]
    change(tiny, **changes)
    begun = time.process_time()
    run = hfprune("plan", tiny, "--prune-ratio", 0.2)
    assert time.process_time() - begun < 2
    assert (run.code, len(run.err.splitlines())) == (2, 1), run.err
    assert run.err.strip().isprintable()
    assert len(run.err) < 500
    with pytest.raises(HFPruneError, match=message):
        blueprint(tiny, device="cpu")


ACCEPTED: dict[str, dict[str, Any]] = {
    "ten million labels": {"num_labels": 10**7},
    "many labels": {"id2label": {str(i): "x" for i in range(5000)}},
    "layers of qwen2": {"model_type": "qwen2", "num_hidden_layers": 1000},
    "a vocabulary of 2^28": {"vocab_size": 1 << 28},
    "names of methods": {"to_dict": 5, "__class__": "x", "__init__": 3, "sub_configs": {"a": 1}},
    "outputs": {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
    "architectures of another type": {"architectures": [HUGE, {}, None]},
    "dtype of torch": {"dtype": None, "torch_dtype": "torch.bfloat16"},
    "no token for padding": {"pad_token_id": -1},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_plan_takes_in_little_time(tiny: Path, hfprune: Hfprune, case: str) -> None:
    change(tiny, **ACCEPTED[case])
    begun = time.process_time()
    run = hfprune("plan", tiny, "--prune-ratio", 0.2, "--json")
    assert time.process_time() - begun < 10
    assert run.code == 0, run.err
    sizes = {"num_hidden_layers", "vocab_size", "model_type"} & ACCEPTED[case].keys()
    assert run.json()["dense_params"] == 1_049_728 or sizes
    if not sizes:
        assert blueprint(tiny, device="cpu").model.config.return_dict
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tiny / name).symlink_to(TINY_MODEL / name)
        assert len(open_source(tiny).tokenizer) == 2048  # transformers reads the config for it


def test_layers_are_bounded_by_the_tensors_there_are(tiny: Path) -> None:
    change(tiny, num_hidden_layers=999)
    with pytest.raises(HFPruneError, match="has num_hidden_layers 999, but its files hold 4"):
        open_source(tiny)
    tensors = {f"model.layers.0.x{i}.weight": torch.zeros(0) for i in range(10_000)}
    (tiny / "model.safetensors").unlink()
    save_file(tensors, tiny / "model.safetensors", {"format": "pt"})
    begun = time.process_time()
    with pytest.raises(HFPruneError, match="but its files hold 1 layers"):
        open_source(tiny)
    assert time.process_time() - begun < 2


def test_a_plan_of_many_layers_counts_them_all(tiny: Path, hfprune: Hfprune) -> None:
    sizes = []
    for layers in (4, 5, 1000):  # as many as are allowed
        change(tiny, num_hidden_layers=layers)
        begun = time.process_time()
        run = hfprune("plan", tiny, "--prune-ratio", 0.2, "--json")
        assert time.process_time() - begun < 10
        sizes.append(run.json()["dense_params"])
    assert sizes[2] - sizes[0] == 996 * (sizes[1] - sizes[0])


def test_a_byte_order_mark(tiny: Path, hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert hfprune("plan", tiny, "--prune-ratio", 0.2).code == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny / name).symlink_to(TINY_MODEL / name)
    out = tiny.parent / "scores"
    score = ["score", tiny, "--calibration", "demo", "--samples", 2, "--seq-len", 32]
    from_pretrained = AutoTokenizer.from_pretrained

    def reading(folder: Path, **options: Any) -> Any:  # as it does for large vocabularies
        assert (
            json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 2048
        )
        return from_pretrained(folder, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", reading)
    run = hfprune(*score, "--dtype", "float32", "--out", out)
    assert run.code == 0, run.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to itself", "a folder", "large"])
def test_only_regular_files_of_some_size_are_read(
    tiny: Path, hfprune: Hfprune, name: str, kind: str
) -> None:
    if name != "config.json":
        (tiny / "model.safetensors").unlink()
    path = tiny / name
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # sparse
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else name)
    commands = [["prune", tiny, "--criterion", "magnitude", "--out", tiny.parent / "out"]]
    commands += [["plan", tiny]] if name == "config.json" else []
    for command in commands:
        run = hfprune(*command, "--prune-ratio", 0.2)
        assert run.code == 2, run.err
        assert len(run.err.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to itself", "large"])
def test_tokenizer_files_are_regular(llama_dir: Path, hfprune: Hfprune, kind: str) -> None:
    path = llama_dir / "tokenizer.json"
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else path.name)
    out = llama_dir.parent / "scores"
    run = hfprune("score", llama_dir, "--calibration", "demo", "--out", out)
    assert run.code == 2, run.err
    assert "tokenizer.json is no regular file" in run.err


def test_a_model_without_a_head(llama_dir: Path, hfprune: Hfprune) -> None:
    change(llama_dir, architectures=["LlamaModel"])
    run = hfprune("plan", llama_dir, "--prune-ratio", 0.2)
    assert run.code == 2
    assert "a model without a head" in run.err
    change(llama_dir, tie_word_embeddings=True)
    assert hfprune("plan", llama_dir, "--prune-ratio", 0.2).code == 0
