"""Layers of different widths, written in each layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from uneven import WIDTHS, keep_of, logits, widths_of

import hfprune_fast as hf
from hfprune_fast.checkpoint import layouts, loading
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import LAYOUTS
from hfprune_fast.errors import ArgumentError


def test_padding_is_zeros_and_replaced_tensors_are_padded_too(
    llama_dir: Path, tmp_path: Path
) -> None:
    keep, widths = keep_of((61, 70, 30)), (61, 70, 30)
    down, up = "model.layers.2.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    refitted = torch.randn(64, 30)
    result = hf.prune_checkpoint(
        llama_dir, tmp_path / "out", keep, layout="padded", replace={down: refitted}, verify=True
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(llama_dir / "model.safetensors")
    assert torch.equal(written[down], torch.cat([refitted, torch.zeros(64, 40)], dim=1))
    assert torch.equal(written[up], torch.cat([stored[up][keep[0]], torch.zeros(9, 64)]))
    assert all(t.shape in ((70, 64), (64, 70)) for n, t in written.items() if ".mlp." in n)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        **json.loads((llama_dir / "config.json").read_text()),
        "intermediate_size": 70,
    }
    assert (result["layout"], result["mlp_widths"]) == ("padded", list(widths))
    assert result["params"] == sum(t.numel() for t in written.values())  # padding and all
    card = (tmp_path / "out" / "README.md").read_text()
    assert "30 to 70 (mean 53.7) of 96, padded with zeros to the widest" in card
    assert "as large as if all layers were as wide" in card
    with pytest.raises(ArgumentError, match=r"must be \(64, 30\) torch.float32, got \(64, 70\)"):
        hf.prune_checkpoint(
            llama_dir, tmp_path / "b", keep, layout="padded", replace={down: torch.ones(64, 70)}
        )


def test_layouts_of_one_width_are_one(llama_dir: Path, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        hf.prune_checkpoint(llama_dir, tmp_path / layout, keep_of((50, 50, 50)), layout=layout)
    files = [{p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in LAYOUTS]
    assert all(file == files[0] for file in files)
    with pytest.raises(ArgumentError, match=r"layout must be one of auto, .*, got 'uneven'"):
        hf.prune_checkpoint(llama_dir, tmp_path / "out", keep_of(), layout="uneven")


def test_native_layout_only_where_transformers_builds_it(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OwnWidthLayer(modeling_llama.LlamaDecoderLayer):
        """As a version of transformers would build it that knows per_layer_config."""

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config.per_layer_config[layer_idx], layer_idx)

    with pytest.raises(ArgumentError, match=r"layout native: .*; use layout custom or padded"):
        hf.prune_checkpoint(llama_dir, tmp_path / "out", keep_of(), layout="native")
    assert not (tmp_path / "out").exists()
    assert layouts.native_families() == []
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", OwnWidthLayer)
    assert layouts.native_families() == ["llama"]
    with monkeypatch.context() as patch:
        patch.delattr(torch, "set_default_dtype")  # which would reach every thread
        result = hf.prune_checkpoint(llama_dir, tmp_path / "out", keep_of(), layout="native")
    assert result["params"] == open_source(tmp_path / "out").spec.total_params
    model = random_llama()
    hf.prune(model, keep_of())
    native = loading.load_model(tmp_path / "out", device="cpu")
    assert torch.equal(logits(native), logits(model))
    for pruned in (native, model):
        hf.prune(pruned, keep_of((40, 41, 30), WIDTHS))
    assert native.config.to_dict() == model.config.to_dict()
    native.save_pretrained(tmp_path / "again")
    again = loading.load_model(tmp_path / "again", device="cpu")
    assert torch.equal(logits(again), logits(model))
    assert not (tmp_path / "out" / "modeling_hfprune.py").exists()
    hf.prune_checkpoint(tmp_path / "out", tmp_path / "even", keep_of((20, 20, 20), WIDTHS))
    assert "per_layer_config" not in json.loads((tmp_path / "even" / "config.json").read_text())


def test_achieved_sizes_are_returned(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = hf.prune_checkpoint(llama_dir, out, keep_of())
    model = loading.load_model(out, device="cpu")
    removed = 3 * 96 - sum(WIDTHS)
    assert result["mlp_widths"] == list(WIDTHS)
    assert (result["intermediate_size"], result["dense_intermediate_size"]) == (96, 96)
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["prune_ratio"] == pytest.approx(removed / (3 * 96), rel=1e-15)
    assert result["dense_params"] - result["params"] == removed * 3 * 64
    record = json.loads((out / "hfprune.json").read_text())
    assert record["achieved"] == result
    assert [len(record["keep"][f"model.layers.{i}.mlp"]) for i in range(3)] == list(WIDTHS)
    assert "modeling_hfprune.py" in record["files"]
    assert "| 30 to 96 (mean 62.3) of 96 |" in (out / "README.md").read_text()
    hf.prune_checkpoint(llama_dir, out, keep_of((5, 6, 7)), force=True)  # the code file is ours too


def test_pruned_again(llama_dir: Path, tmp_path: Path) -> None:
    one, two, even = (tmp_path / name for name in ("one", "two", "even"))
    hf.prune_checkpoint(llama_dir, one, keep_of())
    narrower = keep_of((40, 41, 30), WIDTHS)
    result = hf.prune_checkpoint(one, two, narrower)
    assert result["dense_mlp_widths"] == list(WIDTHS)
    assert widths_of(loading.load_model(two, device="cpu")) == (40, 41, 30)
    model = loading.load_model(one, device="cpu")
    hf.prune(model, narrower)
    assert torch.equal(logits(loading.load_model(two, device="cpu")), logits(model))
    with pytest.raises(ArgumentError, match=r"keep\[2\] must be .* in 0\.\.29"):
        hf.prune_checkpoint(one, tmp_path / "out", keep_of((40, 40, 40), (61, 96, 96)))
    hf.prune_checkpoint(two, even, keep_of((25, 25, 25), (40, 41, 30)))
    assert not (even / "modeling_hfprune.py").exists()
    config = json.loads((even / "config.json").read_text())
    assert config == {
        **json.loads((llama_dir / "config.json").read_text()),
        "intermediate_size": 25,
    }
    assert type(AutoModelForCausalLM.from_pretrained(even)) is LlamaForCausalLM


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_widths": [61, 96]}, r"width in 1\.\.96 for each of its 3 layers, got \[61, 96\]"),
        ({"mlp_widths": [61, 97, 30]}, "MLP width in"),
        ({"mlp_widths": [61, True, 30]}, "MLP width in"),
        ({"mlp_widths": "96"}, "MLP width in"),
        ({"mlp_widths": [61, 96, 31]}, "does not say what mlp_widths says, .*; delete per_layer_"),
        ({"mlp_widths": [61, 96, 31], "per_layer_config": None}, "shape is not its config's"),
        ({"mlp_widths": None}, r"does not say what mlp_widths says, \[96, 96, 96\]"),
        ({"mlp_widths": None, "per_layer_config": None}, "shape is not its config's"),
        ({"per_layer_config": {"0": {"intermediate_size": 61}}}, "does not say what mlp_widths"),
        ({"per_layer_config": [3]}, "does not say what mlp_widths says"),
        ({"model_type": "hfprune_gpt2"}, "no gated MLP is known for model_type 'hfprune_gpt2'"),
        ({"model_type": "llama", "per_layer_config": None}, "shape is not its config's"),
        ({"model_type": "llama", "per_layer_config": {"0": {"head_dim": 3}}}, "nothing else is kn"),
        ({"model_type": "llama", "per_layer_config": [3]}, "nothing else is known"),
    ],
)
def test_config_that_is_not_what_the_tensors_are(
    llama_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    hf.prune_checkpoint(llama_dir, out, keep_of())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(hf.HFPruneError, match=message):
        open_source(out)
