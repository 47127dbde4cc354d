"""A tiny configuration of every family, with each of its oddities far from neutral.

To add a family, add an entry to TINY: which models people know it by, what differs from SIZES, and
where the layers and down_proj are (the list is the tests' own: nothing here imports the package).
Multipliers, softcaps and logit scales are not 1, biases are there where a family can have them, a
sliding window is shorter than the sequences, and every kind of layer occurs.
"""

from dataclasses import dataclass, field
from typing import Any

V = 127
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": V,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = {"sliding_window": 7}
SOME_SLIDE = {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}
HEAD_16 = {"head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 1.7, "residual_multiplier": 0.6,
    "attention_multiplier": 0.3, "attention_bias": True,
}  # fmt: skip
QWEN3_5 = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    },
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_bias": True, **HEAD_16,
}  # fmt: skip
GEMMA3 = {
    "query_pre_attn_scalar": 24, "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    **HEAD_16, **WINDOW,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A family's tiny model."""

    known_as: str  # models that people know
    overrides: dict[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    down: str = "mlp.down_proj"  # below a layer
    vision: dict[str, Any] | None = None  # of a wrapper, whose text_config the overrides are
    text_type: str | None = None  # of a wrapper: the model_type of its text_config


TINY: dict[str, Tiny] = {
    "llama": Tiny("Llama 2 and 3", {"rope_parameters": LLAMA3, **BIASES}),
    "mistral": Tiny("Mistral 7B, Mistral Nemo", WINDOW),
    "qwen2": Tiny("Qwen2, Qwen2.5", SOME_SLIDE),
    "qwen3": Tiny("Qwen3", {"head_dim": 24, "attention_bias": True, **SOME_SLIDE}),
    "smollm3": Tiny("SmolLM3", {"no_rope_layer_interval": 2, **BIASES, **SOME_SLIDE}),
    "seed_oss": Tiny("Seed-OSS", {"attention_out_bias": True, **BIASES, **HEAD_16}),
    "ernie4_5": Tiny("ERNIE 4.5 0.3B", {"use_bias": True, **HEAD_16}),
    "hunyuan_v1_dense": Tiny(
        "Hunyuan 0.5B to 7B",
        {
            "rope_parameters": {
                "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 5.0,
            },
            "attention_bias": True, **HEAD_16,
        },
    ),
    "ministral": Tiny(
        "Ministral 8B",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **HEAD_16, **WINDOW,
        },
    ),
    "ministral3": Tiny("Ministral 3", {"rope_parameters": YARN, **HEAD_16}),
    "cwm": Tiny(
        "Code World Model",
        {
            "num_hidden_layers": 4, "mlp_bias": True, "rope_parameters": LLAMA3, **HEAD_16,
            **WINDOW,
        },
    ),
    "diffllama": Tiny("DiffLlama", {"attention_bias": True, "mlp_bias": True}),
    "granite_swa": Tiny("Granite with sliding windows", {**GRANITE, **WINDOW}),
    "hyperclovax": Tiny(
        "HyperCLOVA X SEED",
        {
            "embedding_multiplier": 3.0, "logits_scaling": 0.7, "residual_multiplier": 0.6,
            "attention_multiplier": 0.3, **BIASES,
        },
    ),
    "minicpm3": Tiny(
        "MiniCPM3",
        {
            "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 16, "scale_emb": 3,
        },
    ),
    "vaultgemma": Tiny(
        "VaultGemma",
        {
            "query_pre_attn_scalar": 24, "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 2.0, "attention_bias": True, **HEAD_16, **WINDOW,
        },
    ),
    "bamba": Tiny(
        "Bamba",
        {
            "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
            "mamba_n_groups": 1, "mamba_proj_bias": True, "attn_layer_indices": [1], **BIASES,
        },
        down="feed_forward.down_proj",
    ),
    "helium": Tiny("Helium 1", {"head_dim": 8, **BIASES}),
    "gemma": Tiny("Gemma 1", {"attention_bias": True, **HEAD_16}),
    "olmo": Tiny("OLMo 1", {"clip_qkv": 1.0, "attention_bias": True}),
    "stablelm": Tiny("StableLM 2", {"use_qkv_bias": True, "qk_layernorm": True}),
    "phi3": Tiny(
        "Phi-3, Phi-3.5, Phi-4",
        {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            },
            **HEAD_16, **WINDOW,
        },
    ),
    "glm": Tiny("GLM-4 9B", HEAD_16),
    "glm4": Tiny("GLM-4 0414", HEAD_16),
    "granite": Tiny("Granite 3", {"mlp_bias": True, **GRANITE}),
    "cohere": Tiny(
        "Command R", {"logit_scale": 0.7, "use_qk_norm": True, "attention_bias": True}
    ),
    "cohere2": Tiny(
        "Command R7B, Command A",
        {"logit_scale": 0.7, "num_hidden_layers": 4, "attention_bias": True, **WINDOW},
    ),
    "gemma2": Tiny(
        "Gemma 2",
        {
            "query_pre_attn_scalar": 24, "final_logit_softcapping": 4.0,
            "attn_logit_softcapping": 2.0, "attention_bias": True, **HEAD_16, **WINDOW,
        },
    ),
    "gemma3_text": Tiny("Gemma 3 270M, 1B", {"final_logit_softcapping": 4.0, **GEMMA3}),
    "gemma4_text": Tiny(
        "Gemma 4, the text of its dense models",
        {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "global_head_dim": 24,
            "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "final_logit_softcapping": 4.0, **HEAD_16, **WINDOW,
        },
    ),
    "olmo2": Tiny("OLMo 2", {"attention_bias": True}),
    "olmo3": Tiny("OLMo 3", {"num_hidden_layers": 4, "attention_bias": True, **WINDOW}),
    "exaone4": Tiny(
        "EXAONE 4", {"num_hidden_layers": 4, "sliding_window_pattern": 4, **WINDOW}
    ),
    "qwen3_5_text": Tiny("Qwen3.5, its text alone", QWEN3_5),
    "lfm2": Tiny(
        "LFM2",
        {
            "num_hidden_layers": 4, "conv_bias": True,
            "intermediate_size": 60, "block_multiple_of": 8,  # of which 40 neurons are made
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
        down="feed_forward.w2",
    ),
    "granitemoehybrid": Tiny(
        "Granite 4.0 without experts",
        {
            "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 40,
            "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
            "mamba_proj_bias": True, "position_embedding_type": "rope",
            "layer_types": ["mamba", "attention", "mamba"], **GRANITE,
        },
        down="shared_mlp.output_linear",
    ),
    "falcon_h1": Tiny(
        "Falcon-H1",
        {
            "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
            "mamba_chunk_size": 16, "mamba_proj_bias": True, "mamba_rms_norm": True,
            "projectors_bias": True, "lm_head_multiplier": 0.8, "embedding_multiplier": 3.0,
            "mlp_multipliers": [0.7, 1.4], "key_multiplier": 1.2, "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.6,
            "ssm_multipliers": [0.875, 1.25, 0.75, 1.5, 0.5], **BIASES, **HEAD_16,
        },
        down="feed_forward.down_proj",
    ),
    "qwen3_5": Tiny(
        "Qwen3.5", QWEN3_5, "model.language_model.layers", vision=QWEN_VISION,
        text_type="qwen3_5_text",
    ),
    "gemma4": Tiny(
        "Gemma 4 12B and 31B",
        {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "global_head_dim": 24, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
            "final_logit_softcapping": 4.0, **HEAD_16, **WINDOW,
        },
        "model.language_model.layers", vision=VISION | HEAD_16, text_type="gemma4_text",
    ),
    "internvl": Tiny(
        "InternVL3", SOME_SLIDE, "model.language_model.layers",
        vision=VISION | {"image_size": [16, 16], "patch_size": [4, 4]}, text_type="qwen2",
    ),
    "llava": Tiny(
        "LLaVA 1.5, Pixtral", {}, "model.language_model.layers", vision=VISION, text_type="llama",
    ),
    "llava_next": Tiny(
        "LLaVA-NeXT", WINDOW, "model.language_model.layers", vision=VISION, text_type="mistral",
    ),
    "llava_onevision": Tiny(
        "LLaVA-OneVision", SOME_SLIDE, "model.language_model.layers", vision=VISION,
        text_type="qwen2",
    ),
    "lfm2_vl": Tiny(
        "LFM2-VL",
        {
            "num_hidden_layers": 4, "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
        "model.language_model.layers", "feed_forward.w2", vision=VISION | {"num_patches": 16},
        text_type="lfm2",
    ),
    "qwen2_vl": Tiny(
        "Qwen2-VL", {"rope_parameters": MROPE}, "model.language_model.layers",
        vision={**QWEN_VISION, "embed_dim": 16}, text_type="qwen2_vl_text",
    ),
    "qwen3_vl": Tiny(
        "Qwen3-VL",
        {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "attention_bias": True, **HEAD_16,
        }, "model.language_model.layers",
        vision=QWEN_VISION | {"deepstack_visual_indexes": [0]}, text_type="qwen3_vl_text",
    ),
    "qwen2_5_vl": Tiny(
        "Qwen2.5-VL", {"rope_parameters": MROPE}, "model.language_model.layers",
        vision=QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 16},
        text_type="qwen2_5_vl_text",
    ),
    "gemma3": Tiny(
        "Gemma 3 4B to 27B", GEMMA3, "model.language_model.layers", vision=VISION,
        text_type="gemma3_text",
    ),
    "mistral3": Tiny(
        "Mistral Small 3.1, Ministral 3", {"rope_parameters": YARN, **HEAD_16},
        "model.language_model.layers", vision=VISION | HEAD_16, text_type="ministral3",
    ),
    "exaone4_5": Tiny(
        "EXAONE 4.5", {"num_hidden_layers": 4, "sliding_window_pattern": 4, **WINDOW},
        "model.language_model.layers", text_type="exaone4", vision=QWEN_VISION | {
            "fullatt_block_indexes": [0], "window_size": 16, "num_key_value_heads": 2,
        },
    ),
    "idefics3": Tiny(
        "Idefics3", BIASES, "model.text_model.layers", vision=VISION, text_type="llama",
    ),
    "smolvlm": Tiny(
        "SmolVLM", BIASES, "model.text_model.layers", vision=VISION, text_type="llama",
    ),
}  # fmt: skip
