"""Checkpoints of tiny models with experts, as save_pretrained writes them or otherwise."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": 127,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {
    "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen2_moe": {
        "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [0],
    },
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 24},
    "deepseek_v3": {
        **GROUPED, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "gemma4_text": {
        "num_experts": 4, "moe_intermediate_size": 24, "top_k_experts": 2,
        "enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "head_dim": 8, "global_head_dim": 8,
    },
}  # fmt: skip


def tiny_mixture(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Return a tiny random model of a family with experts; all of its parameters are random."""
    config = AutoConfig.for_model(family, **{**SIZES, **MIXTURES[family], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor += torch.randn(tensor.shape, generator=generator).to(dtype) * 0.2
    return model.eval().requires_grad_(False)


def merge_files(folder: Path, model: PreTrainedModel) -> Path:
    """Write a saved model's weights anew, each parameter of experts as one tensor."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    """Set keys of a folder's config.json; None deletes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    return folder
