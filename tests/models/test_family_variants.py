"""Options of families that the tiny models leave at one value, and files as others write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_truth import SEED
from family_case import FamilyCase, statistics_error
from family_truth import Float64
from safetensors.torch import load_file, save_file

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.pruning.export import export

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "StableLM, attention beside the MLP": ("stablelm", {"use_parallel_residual": True}),
    "Command R without norms of q and k": ("cohere", {"use_qk_norm": False}),
    "Gemma 4 with keys that are not values": ("gemma4_text", {"attention_k_eq_v": False}),
    "LFM2 whose width is not computed": (
        "lfm2",
        {"block_auto_adjust_ff_dim": False, "intermediate_size": 40},
    ),
    "Granite 4.0 without positions": ("granitemoehybrid", {"position_embedding_type": None}),
    "Granite 4.0, attention alone": ("granitemoehybrid", {"layer_types": ["attention"] * 3}),
    "Falcon-H1 without a norm of its states": ("falcon_h1", {"mamba_rms_norm": False}),
    "Mistral Small 3.1": ("mistral3", {"model_type": "mistral", "sliding_window": None}),
    "Qwen3, one layer": ("qwen3", {"num_hidden_layers": 1}),
}


def check(case: FamilyCase, out: Path) -> None:
    """Scores, streamed, are the truth, and a checkpoint pruned on disk is the masked model."""
    with Float64():
        table = hf.score(case.folder, case.batches, criterion="fisher", seed=SEED, offload="disk")
    assert statistics_error(table, {"fisher": case.truth["fisher"]}) < 1e-9
    keep = case.keep([24] * len(case.downs))
    hf.prune_checkpoint(case.folder, out, keep, verify=True)
    assert case.pruned_error(case.load(out), keep) < 1e-12


@pytest.mark.parametrize("which", VARIANTS)
def test_options(which: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[which]
    check(FamilyCase.save(family, tmp_path / "dense", **overrides), tmp_path / "out")


def inside(name: str) -> str:
    """As transformers calls the parts of a wrapper in memory: all below `model`."""
    if name.startswith("lm_head") or "lm_head" in name:
        return "lm_head.weight"
    for text in ("language_model.model.", "model.language_model.", "model."):
        if name.startswith(text):
            return "model.language_model." + name.removeprefix(text)
    return f"model.{name}"


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_a_wrappers_tensors_under_their_names_in_memory(family: str, tmp_path: Path) -> None:
    case = FamilyCase.save(family, tmp_path / "dense")
    file = case.folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {inside(name): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, {"format": "pt"})
    check(case, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == renamed.keys()


def test_a_wrappers_text_beside_its_vision_in_config_json(tmp_path: Path) -> None:
    """As Qwen2.5-VL was published."""
    case = FamilyCase.save("qwen2_5_vl", tmp_path / "dense")
    path = case.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config.pop("text_config") | config))
    check(case, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["intermediate_size"], "text_config" in written) == (24, False)
    custom = case.written("custom")
    export(str(custom.folder), "padded", tmp_path / "padded")
    assert case.pruned_error(case.load(tmp_path / "padded"), custom.keep) < 1e-12


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Leave keys of the text's configuration to the defaults of its class."""

    def edit(config: dict[str, Any]) -> None:
        for key in keys:
            del config["text_config"][key]

    return edit


def without_theta(config: dict[str, Any]) -> None:
    del config["text_config"]["rope_parameters"]["rope_theta"]
    del config["text_config"]["rms_norm_eps"]


def by_its_alias(config: dict[str, Any]) -> None:
    config["layers_block_type"] = config.pop("layer_types")


def tied_inside_alone(config: dict[str, Any]) -> None:
    config["text_config"]["tie_word_embeddings"] = True
    del config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("qwen2_5_vl", without_theta),  # other defaults than Qwen2's
        ("qwen2_vl", without_theta),
        ("qwen3_vl", without("rope_parameters")),
        ("mistral3", without("model_type")),
        ("gemma3", without("model_type")),
        ("qwen2_5_vl", tied_inside_alone),
        ("granitemoehybrid", by_its_alias),
    ],
)
def test_what_a_config_leaves_to_its_class_or_calls_otherwise(
    family: str, edit: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    case = FamilyCase.save(family, tmp_path / "dense")
    path = case.folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    theirs, ids = case.load(case.folder, dtype=torch.float64), case.ids[0][None]
    with Float64(), torch.no_grad():
        ours = loading.load_model(case.folder, device="cpu", dtype="float64")
        assert torch.equal(ours(ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_text"])
def test_a_head_for_several_tokens_is_carried_along(family: str, tmp_path: Path) -> None:
    """transformers leaves its tensors unread; they are no layer of the model and are not cut."""
    case = FamilyCase.save(family, tmp_path / "dense")
    file = case.folder / "model.safetensors"
    more = {
        "mtp.fc.weight": torch.ones(32, 64),
        "mtp.layers.0.mlp.up_proj.weight": torch.ones(40, 32),
    }
    more = {name: tensor.double() for name, tensor in more.items()}
    save_file(load_file(file) | more, file, {"format": "pt"})
    check(case, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in more.items())


def test_a_plan_of_a_wrapper_names_its_text_alone(
    tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    case = FamilyCase.save("gemma3", tmp_path)
    run = hfprune("plan", case.folder, "--intermediate-size", 24, "--json")
    assert (run.json()["intermediate_size"], run.json()["dense_intermediate_size"]) == (24, 40)
