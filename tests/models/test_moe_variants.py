"""Options of families with experts that the tiny models leave at one value."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from criteria_truth import SEED
from experts_truth import Seen, all_experts, unchanged
from family_truth import Float64, own_logits
from mixture_case import MixtureCase, expert_errors, slow
from safetensors.torch import load_file, save_file

import hfprune_fast as hf

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral without a window": ("mixtral", {"sliding_window": None}),
    "Qwen2-MoE, all layers with experts": ("qwen2_moe", {"mlp_only_layers": []}),
    "Qwen2-MoE whose weights sum to 1": ("qwen2_moe", {"norm_topk_prob": True}),
    "Qwen3-MoE, every other layer with experts": (
        "qwen3_moe",
        {"mlp_only_layers": [], "decoder_sparse_step": 2},
    ),
    "Qwen3-MoE that chooses all that stay": ("qwen3_moe", {"num_experts_per_tok": 5}),
    "Qwen3-MoE, one expert a token": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "OLMoE whose weights sum to 1": ("olmoe", {"norm_topk_prob": True}),
    "gpt-oss without clamps": ("gpt_oss", {"swiglu_limit": 1e9}),
    "GLM-4.5 without groups": ("glm4_moe", {"n_group": 1}),
    "GLM-4.5, all groups of a token": ("glm4_moe", {"topk_group": 2}),
    "GLM-4.5, no dense layer": ("glm4_moe", {"first_k_dense_replace": 0}),
    "DeepSeek-V3 whose weights sum to 1": ("deepseek_v3", {"norm_topk_prob": True}),
    "DeepSeek-V3 without q_lora": ("deepseek_v3", {"q_lora_rank": None}),
    "Gemma 4 with keys that are not values": (
        "gemma4_text+experts",
        {"attention_k_eq_v": False},
    ),
}
FAST = "GLM-4.5, all groups of a token"


def check(case: MixtureCase, out: Path) -> None:
    """Scores, streamed, are the truth, and a checkpoint pruned on disk is the masked model."""
    with Float64():
        table = hf.score(
            case.folder, case.batches, criterion=("entropy", "fisher"), seed=SEED, offload="disk"
        )
    errors = expert_errors(table, case.experts_truth)
    assert max(errors.values()) < 1e-9, errors
    keep = case.keep_of("all")
    hf.prune_checkpoint(case.folder, out, keep, verify=True)
    assert case.pruned_error(case.load(out), keep) < 1e-12


@pytest.mark.parametrize("which", [which if which == FAST else slow(which) for which in VARIANTS])
def test_options(which: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[which]
    check(MixtureCase.save(family, tmp_path / "dense", **overrides), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", ("num_experts", "num_local_experts")),
        ("gpt_oss", ("num_experts", "num_local_experts")),
        ("deepseek_v3", ("n_routed_experts", "num_local_experts")),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_the_number_of_experts_is_written_under_the_key_that_is_there(
    family: str, names: tuple[str, str], which: int, tmp_path: Path
) -> None:
    """Published configs and those that transformers saves differ in it."""
    case = MixtureCase.save(family, tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    (there,) = [name for name in names if name in config]
    config[names[which]] = config.pop(there)
    path.write_text(json.dumps(config))
    keep = case.keep_of("dropped")
    hf.prune_checkpoint(case.folder, tmp_path / "out", keep, verify=True)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written[names[which]], names[1 - which] in written) == (case.tiny.kept, False)
    assert case.pruned_error(case.load(tmp_path / "out"), keep) < 1e-12


@pytest.mark.parametrize("offload", ["none", slow("disk")])
@pytest.mark.parametrize("family", ["glm4_moe", slow("deepseek_v3")])
def test_a_correction_bias_stays_in_float32(family: str, offload: str, tmp_path: Path) -> None:
    """transformers keeps it so in a bfloat16 model, where 64.1 and 64.2 would be one number."""
    options = {"first_k_dense_replace": 0, "num_hidden_layers": 1, "dtype": torch.bfloat16}
    case = MixtureCase.save(family, tmp_path, **options)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors[name] = tensors[name].float() + 64
    save_file(tensors, file, {"format": "pt"})
    model, seen = case.load(tmp_path, dtype=torch.bfloat16), Seen()
    with torch.no_grad(), all_experts(case.tiny, model, unchanged, seen):
        own_logits(model, case.ids[0])
    table = hf.score(tmp_path, [case.ids[0][None]], dtype="bfloat16", offload=offload)
    (chosen,) = seen.chosen.values()
    assert table.experts("expert_count").tolist() == [chosen.double().sum(0).tolist()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("deepseek_v3", "model.layers.61"),
        ("glm4_moe", "model.layers.46"),
        ("qwen3_next", "mtp.layers.0"),
    ],
)
def test_a_layer_that_predicts_further_tokens_is_carried_along(
    family: str, layer: str, tmp_path: Path
) -> None:
    """transformers leaves its tensors unread; its experts are none of the model and are not cut."""
    case = MixtureCase.save(family, tmp_path / "dense")
    file = case.folder / "model.safetensors"
    more = {
        f"{layer}.eh_proj.weight": torch.ones(32, 64),
        f"{layer}.mlp.gate.weight": torch.ones(8, 32),
        f"{layer}.mlp.experts.7.up_proj.weight": torch.ones(24, 32),
    }
    more = {name: tensor.double() for name, tensor in more.items()}
    save_file(load_file(file) | more, file, {"format": "pt"})
    check(case, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in more.items())
