"""The widths of a custom checkpoint in transformers' own notation, beside `mlp_widths`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from uneven import WIDTHS, keep_of, logits

import hfprune_fast as hf
from hfprune_fast.checkpoint import layouts, loading


def test_per_layer_config_follows_mlp_widths(tmp_path: Path) -> None:
    def written() -> tuple[Any, Any]:
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        return config.get("mlp_widths"), config.get("per_layer_config")

    def both(widths: tuple[int, ...]) -> tuple[Any, Any]:
        return list(widths), layouts.per_layer_config(widths)

    model = random_llama()
    hf.prune(model, keep_of())
    model.save_pretrained(tmp_path / "saved")
    assert written() == both(WIDTHS)
    assert AutoConfig.from_pretrained(tmp_path / "saved").to_dict()["mlp_widths"] == list(WIDTHS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert tuple(layer.intermediate_size for layer in model.config.per_layer_config) == WIDTHS
    assert model.config.per_layer_config["full_attention"] is model.config
    assert model.config.intermediate_size == 96
    hf.prune(model, keep_of((40, 41, 30), WIDTHS))
    model.save_pretrained(tmp_path / "saved")
    assert written() == both((40, 41, 30))
    model = loading.load_model(tmp_path / "saved", device="cpu")
    hf.prune(model, keep_of((25, 25, 25), (40, 41, 30)))
    model.save_pretrained(tmp_path / "saved")
    assert written() == (None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"mlp_widths": [61, 96, 31]},
        {"mlp_widths": None},
        {"per_layer_config": {"1": {"intermediate_size": 40}}},
        {"per_layer_config": []},
    ],
)
def test_two_fields_that_say_different_widths_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    model = random_llama()
    hf.prune(model, keep_of())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="delete per_layer_config from config"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    given = change.get("mlp_widths", list(WIDTHS))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "config")  # nothing is mended
    saved = json.loads((tmp_path / "config" / "config.json").read_text())
    assert saved.get("mlp_widths") == given
    assert saved["per_layer_config"] == json.loads(path.read_text())["per_layer_config"]


def test_layers_that_transformers_built_by_per_layer_config_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    class OwnWidthLayer(modeling_llama.LlamaDecoderLayer):
        """As a version of transformers would build it that knows per_layer_config."""

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config.per_layer_config[layer_idx], layer_idx)
            built.append(self.mlp)

    model = random_llama()
    hf.prune(model, keep_of())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", OwnWidthLayer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.mlp for layer in loaded.model.layers] == built
    assert torch.equal(logits(loaded), logits(model))
