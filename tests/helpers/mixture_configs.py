"""A tiny configuration of every family with experts, with each of its oddities far from neutral.

To add a family, add an entry to MIXTURES, as to TINY of family_configs: besides, how its router
chooses, and where experts, router and the MLP beside them are. No two kinds of MLP of a model have
one width, some layers are dense where a family can have them, and weights of chosen experts sum to
1 in some families and do not in others.
"""

from dataclasses import dataclass
from typing import Any

from family_configs import (
    GRANITE,
    HEAD_16,
    QWEN3_5,
    QWEN_VISION,
    SOME_SLIDE,
    TINY,
    VISION,
    WINDOW,
    Tiny,
)

E, EXPERT_F = 8, 24  # experts of a layer, neurons of each


@dataclass(frozen=True)
class Mixture(Tiny):
    """The tiny model of a family with experts; paths are below a layer.

    `down` is that of a layer's own MLP, `shared` that of one beside experts. `kept` is how many
    experts are left where some are dropped.
    """

    routing: str = "softmax"  # of experts_truth.ROUTINGS
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    shared: str = ""
    kept: int = 5


OF_E = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_F}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": 2, "intermediate_size": EXPERT_F}
QWEN_SHARED = {**OF_E, "shared_expert_intermediate_size": 28}
GEMMA4 = {
    "enable_moe_block": True, "num_experts": E, "top_k_experts": 2,
    "moe_intermediate_size": EXPERT_F,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": E, "moe_intermediate_size": EXPERT_F, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
QWEN3_5_MOE = {
    **QWEN3_5, **QWEN_SHARED, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

MIXTURES: dict[str, Mixture] = {
    "mixtral": Mixture("Mixtral", {**LOCAL, **WINDOW}),
    "qwen2_moe": Mixture(
        "Qwen1.5-MoE",
        {
            **QWEN_SHARED, "num_experts_per_tok": 3, "mlp_only_layers": [0],
            "norm_topk_prob": False, **SOME_SLIDE,
        },
        shared="mlp.shared_expert.down_proj",
    ),
    "qwen3_moe": Mixture(
        "Qwen3-30B-A3B, Qwen3-235B",
        {
            **OF_E, "num_experts_per_tok": 3, "mlp_only_layers": [1], "norm_topk_prob": True,
            "attention_bias": True, **HEAD_16,
        },
    ),
    "olmoe": Mixture(
        "OLMoE",
        {
            "num_experts": E, "num_experts_per_tok": 3, "intermediate_size": EXPERT_F,
            "clip_qkv": 1.0, "attention_bias": True,
        },
    ),
    "gpt_oss": Mixture(
        "gpt-oss-20b, gpt-oss-120b",
        {
            **LOCAL, "swiglu_limit": 0.9, "swiglu_alpha": 1.3,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16,
            },
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **HEAD_16, **WINDOW,
        },
        routing="chosen", router="mlp.router",
    ),
    "granitemoe": Mixture(
        "Granite 3 MoE", {**GRANITE, **LOCAL, "num_experts_per_tok": 3}, routing="chosen",
        experts="block_sparse_moe.experts", router="block_sparse_moe.router",
    ),
    "qwen3_next": Mixture(
        "Qwen3-Next-80B-A3B",
        {
            **QWEN3_5, **QWEN_SHARED, "num_hidden_layers": 3, "mlp_only_layers": [2],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            },
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        shared="mlp.shared_expert.down_proj",
    ),
    "qwen3_5_moe_text": Mixture(
        "Qwen3.5, Qwen3.6 with experts, their text alone", QWEN3_5_MOE,
        shared="mlp.shared_expert.down_proj",
    ),
    "glm4_moe": Mixture(
        "GLM-4.5, GLM-4.6",
        {
            **GROUPED, "num_experts_per_tok": 3, "n_shared_experts": 1, "use_qk_norm": True,
            "routed_scaling_factor": 1.7, "attention_bias": True, **HEAD_16,
        },
        routing="grouped", shared="mlp.shared_experts.down_proj", kept=6,
    ),
    "deepseek_v3": Mixture(
        "DeepSeek-V3, DeepSeek-R1",
        {
            **GROUPED, "num_experts_per_tok": 2, "n_shared_experts": 2, "norm_topk_prob": False,
            "routed_scaling_factor": 0.6, "num_key_value_heads": 4, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        },
        routing="grouped", shared="mlp.shared_experts.down_proj", kept=4,
    ),
    "gemma4_text+experts": Mixture(
        "Gemma 4 26B-A4B, its text", {**TINY["gemma4_text"].overrides, **GEMMA4},
        routing="scaled", experts="experts", router="router", shared="mlp.down_proj",
    ),
    "gemma4+experts": Mixture(
        "Gemma 4 26B-A4B", {**TINY["gemma4"].overrides, **GEMMA4},
        "model.language_model.layers", vision=VISION | HEAD_16, text_type="gemma4_text",
        routing="scaled", experts="experts", router="router", shared="mlp.down_proj",
    ),
    "qwen3_5_moe": Mixture(
        "Qwen3.5, Qwen3.6 with experts", QWEN3_5_MOE, "model.language_model.layers",
        vision=QWEN_VISION, text_type="qwen3_5_moe_text", shared="mlp.shared_expert.down_proj",
    ),
    "qwen3_vl_moe": Mixture(
        "Qwen3-VL-30B-A3B, 235B-A22B",
        {
            **OF_E, "mlp_only_layers": [1], "attention_bias": True, **HEAD_16,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        "model.language_model.layers", text_type="qwen3_vl_moe_text",
        vision={**TINY["qwen3_vl"].vision},
    ),
}  # fmt: skip


def model_type(family: str) -> str:
    """Return the model_type of an entry of TINY or MIXTURES."""
    return family.partition("+")[0]


MODELS: dict[str, Any] = TINY | MIXTURES
