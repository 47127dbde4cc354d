"""A fingerprint is of the tensors and of what the configuration means, not of its text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import ScoresFileError
from hfprune_fast.scoring import table as tables

IDS = torch.arange(64).view(2, 32)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def change_config(folder: Path, **changes: Any) -> None:
    changed = {k: v for k, v in {**config_of(folder), **changes}.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(changed))


def test_fingerprint_tells_siblings_apart(save_checkpoint: Callable[..., Path]) -> None:
    model = random_llama()
    first = open_source(save_checkpoint(model, "a")).fingerprint
    assert open_source(save_checkpoint(model, "b", max_shard_size="50KB")).fingerprint == first
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[40:45] += 1e-3
    assert open_source(save_checkpoint(model, "c")).fingerprint != first


SAME: dict[str, dict[str, Any]] = {
    "housekeeping": {"transformers_version": "9.9", "use_cache": False, "_name_or_path": "x"},
    "of an older version": {
        "rope_parameters": "absent", "rope_theta": 10000, "rope_scaling": None,
        "torch_dtype": "float32", "dtype": "absent", "pretraining_tp": 1,
    },
    "defaults left out": {
        "rope_parameters": "absent", "attention_bias": "absent", "mlp_bias": "absent",
        "head_dim": "absent", "hidden_act": "absent", "rms_norm_eps": "absent",
    },
    "what only trains or generates": {
        "initializer_range": 0.5, "attention_dropout": 0.1, "eos_token_id": [1, 2],
    },
    "what no model of the family reads": {"unsloth_version": "1", "attn_implementation": "eager"},
}  # fmt: skip
OTHER: dict[str, dict[str, Any]] = {
    "norm": {"rms_norm_eps": 0.5},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "rope, older": {"rope_parameters": "absent", "rope_theta": 5000.0},
    "rope scaled": {"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    "activation": {"hidden_act": "gelu"},
    "family": {"model_type": "mistral", "sliding_window": None},
}


@pytest.mark.parametrize("case", [*SAME, *OTHER])
def test_fingerprint_knows_what_the_configuration_means(llama_dir: Path, case: str) -> None:
    before = open_source(llama_dir).fingerprint
    change_config(llama_dir, **{**SAME, **OTHER}[case])
    assert (open_source(llama_dir).fingerprint == before) == (case in SAME)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_saved_again_keeps_its_scores(
    save_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = save_checkpoint(tiny_model(family, dtype=torch.float32, tied=True))
    hf.score(folder, IDS, device="cpu").save(tmp_path / "scores")
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    for older in ({}, {"rope_parameters": "absent", "rope_theta": 10000.0}):
        change_config(again, transformers_version="4.40.0", **older)
        tables.check_table(hf.ImportanceTable.load(tmp_path / "scores"), open_source(again))


def test_a_tied_head_and_old_buffers_may_be_stored_or_not(
    save_checkpoint: Callable[..., Path],
) -> None:
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32, tied=True))
    before = open_source(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert open_source(folder).fingerprint == before


def test_scores_of_another_fingerprint_are_refused(llama_dir: Path) -> None:
    table = hf.score(open_source(llama_dir), IDS, device="cpu")
    tables.check_table(table, open_source(llama_dir))
    table.provenance["model_fingerprint"] = "0" * 64
    with pytest.raises(ScoresFileError, match="same shape, other weights"):
        tables.check_table(table, open_source(llama_dir))
