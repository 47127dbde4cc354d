"""What cannot be right yet is refused by name, with the reason, before any work."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_case import FamilyCase
from family_configs import SIZES, TINY
from family_models import tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import hfprune_fast as hf
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import CheckpointError, UnsupportedModelError

CLASSES = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
# What is written into config.json: a model_type and its options, and what the refusal must name.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma 4 E2B, inputs of each layer": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 127},
        "hidden_size_per_layer_input",
    ),
    "Gemma 4 E4B, shared keys and values": (
        "gemma4_text",
        {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "num_kv_shared_layers",
    ),
    "Gemma 3n": ("gemma3n_text", {}, "gemma3n"),
    "Granite 4.0 with experts": (
        "granitemoehybrid",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "expert",
    ),
    "Phi-3.5-MoE": ("phimoe", {}, "expert"),
    "Llama 4, its text": ("llama4_text", {}, "expert"),
    "DeepSeek-V2": ("deepseek_v2", {}, "expert"),
    "ERNIE 4.5 with experts": ("ernie4_5_moe", {}, "expert"),
    "Hunyuan A13B": ("hunyuan_v1_moe", {}, "expert"),
    "LFM2 with experts": ("lfm2_moe", {}, "expert"),
    "Jamba": ("jamba", {}, "expert"),
    "Gemma 4 E4B with vision": ("gemma4", {"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
    "Gemma 3 with vision and a softcap": ("gemma3", {"final_logit_softcapping": 4.0}, "capped"),
    "LLaVA whose text has experts": ("llava", {"model_type": "phimoe"}, "expert"),
    "LLaVA whose text has no gate": ("llava", {"model_type": "phi"}, "gate"),
    "Aya Vision": ("aya_vision", {}, "logits"),
    "Qwen2 as an encoder": ("qwen2", {"is_causal": False}, "see later ones"),
    "Gemma 3 as an encoder": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "see later ones",
    ),
    "GPT-2": ("gpt2", {}, "gate"),
    "Phi-1 and 2": ("phi", {}, "gate"),
}  # fmt: skip


def config_of(model_type: str, options: dict[str, Any]) -> Any:
    if model_type in TINY:
        return tiny_config(model_type, **options)
    sizes = {} if model_type in ("gpt2", "aya_vision") else SIZES
    return AutoConfig.for_model(model_type, **sizes)


@pytest.mark.parametrize("which", REFUSED)
def test_it_is_refused_in_one_line(which: str, tmp_path: Path, hfprune: Callable[..., Any]) -> None:
    model_type, options, reason = REFUSED[which]
    config = config_of(model_type, options)
    config.architectures = [name := CLASSES[model_type]]
    config.save_pretrained(tmp_path)
    run = hfprune("plan", tmp_path, "--prune-ratio", 0.25)
    assert (run.code, run.out) == (2, "")
    (line,) = run.err.splitlines()
    assert f"{name} is not supported: " in line
    assert re.search(reason, line), line


@pytest.mark.parametrize("which", ["Gemma 4 E4B, shared keys and values", "Jamba", "Phi-1 and 2"])
def test_a_loaded_model_is_refused_too(which: str) -> None:
    model_type, options, reason = REFUSED[which]
    model = AutoModelForCausalLM.from_config(config_of(model_type, options))
    with pytest.raises(UnsupportedModelError, match=reason):
        hf.score(model, [[[3, 4, 5]]])


@pytest.mark.parametrize(
    "inside",
    [{}, {"text_config": {"model_type": "gemma3"}}, {"text_config": {"model_type": "llava"}}],
)
def test_a_wrapper_without_a_text_of_its_own_is_refused(
    inside: dict[str, Any], tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", **inside}))
    run = hfprune("plan", tmp_path, "--prune-ratio", 0.25)
    assert (run.code, len(run.err.splitlines())) == (2, 1), run.err
    assert "has no text_config of another model_type" in run.err


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0.*expected a positive number"),
        ("cohere", {"logit_scale": float("inf")}, "logit_scale is inf"),
        ("gemma2", {"final_logit_softcapping": -3.0}, "final_logit_softcapping is -3"),
        ("bamba", {"mamba_chunk_size": 0}, "mamba_chunk_size 0"),
        ("falcon_h1", {"mamba_chunk_size": 1 << 50}, "mamba_chunk_size 1125899906842624"),
        ("lfm2", {"block_ff_dim": -5}, "block_ff_dim -5"),
        ("gemma3", {"text_config": [3]}, "text_config that is a list, expected an object"),
        ("qwen2_5_vl", {"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers 10000000"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ("gemma4_text+experts", {"top_k_experts": 9}, "top_k_experts"),
        ("glm4_moe", {"n_group": 3}, "n_group"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group"),
        ("gpt_oss", {"num_local_experts": 0}, "num_local_experts|does not make a model"),
        ("qwen2_moe", {"num_experts": 10**9}, "num_experts"),
    ],
)
def test_values_that_no_model_has(
    family: str, change: dict[str, Any], said: str, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    config = tiny_config(family).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = hfprune("plan", tmp_path, "--prune-ratio", 0.25)
    assert (run.code, len(run.err.splitlines())) == (2, 1), run.err
    assert re.search(said, run.err), run.err


@pytest.mark.parametrize("name", ["rogue.weight", "layers.0.rogue.weight"])
def test_an_unknown_tensor_in_a_text_tower_is_refused(name: str, tmp_path: Path) -> None:
    case = FamilyCase.save("qwen3_vl", tmp_path)
    file = case.folder / "model.safetensors"
    more = {f"model.language_model.{name}": torch.ones(2)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"does not know: model.language_model.{name}"):
        open_source(case.folder)


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:7].clone()


@pytest.mark.parametrize(
    ("family", "name", "change", "said"),
    [
        ("qwen3_moe", "gate.weight", shorter, r"gate.weight is \(7, 32\), expected \(8, 32\)"),
        ("qwen3_moe", "gate.weight", None, "lacks the tensor .*gate.weight"),
        ("qwen3_moe", "experts.3.up_proj.weight", shorter, r"is \(7, 32\), expected \(24, 32\)"),
        ("qwen3_moe", "experts.3.up_proj.weight", None, "lacks the tensor .*3.up_proj.weight"),
        ("mixtral", "experts.7.w2.weight", None, "lacks the tensor .*experts.7.w2.weight"),
        ("glm4_moe", "gate.e_score_correction_bias", None, "lacks the tensor .*correction_bias"),
        ("glm4_moe", "gate.e_score_correction_bias", shorter, r"is \(7,\), expected \(8,\)"),
        ("gpt_oss", "router.bias", shorter, r"router.bias is \(7,\), expected \(8,\)"),
        ("gpt_oss", "experts.down_proj_bias", shorter, r"is \(7, 32\), expected \(8, 32\)"),
        ("granitemoe", "input_linear.weight", shorter, r"is \(7, 48, 32\), expected \(8, 48, 32\)"),
    ],
)
def test_a_damaged_mixture_is_refused(
    family: str, name: str, change: Callable[[Tensor], Tensor] | None, said: str, tmp_path: Path
) -> None:
    file = FamilyCase.save(family, tmp_path).folder / "model.safetensors"
    tensors = load_file(file)
    full = next(each for each in tensors if "layers.2." in each and each.endswith(name))
    tensor = tensors.pop(full)
    save_file(tensors if change is None else tensors | {full: change(tensor)}, file)
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path)


def test_one_expert_more_than_config_json_says_is_refused(tmp_path: Path) -> None:
    file = FamilyCase.save("qwen3_moe", tmp_path).folder / "model.safetensors"
    more = {"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(24, 32)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not know: .*experts.8.up_proj.weight"):
        open_source(tmp_path)
