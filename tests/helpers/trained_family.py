"""A tiny model of any family, trained for a few hundred steps on the shipped text."""

from argparse import Namespace
from typing import Any

import torch
from tiny_model import train
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.pretrained import load_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 2048,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "initializer_range": 0.08, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 64}
# What makes each family itself, where its defaults do not fit a model of this size.
OWN: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
    },
    "gemma2": {**_GEMMA, "final_logit_softcapping": 10.0, "attn_logit_softcapping": 20.0},
    "gemma3_text": _GEMMA,
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False,
        "conv_L_cache": 3,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# The text towers of wrappers, and what is wrapped around them.
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"mm_tokens_per_image": 4}),
    "mistral3": ("mistral", {"spatial_merge_size": 2}),
}


def trained(family: str, *, steps: int = 150, seed: int = 0) -> PreTrainedModel:
    """Return a model in fp32 with the shipped vocabulary, the same for the same arguments.

    Of a wrapper the text tower is trained, and what is around it is random. The training text is
    `calibration.txt`: 20 seconds on one core.
    """
    text, around = WRAPPED.get(family, (family, {}))
    tokenizer = load_tokenizer(TINY_MODEL)
    ids = tokenizer((TINY_MODEL / "calibration.txt").read_text(encoding="utf-8"))["input_ids"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(text, **(SIZES | OWN.get(text, {})))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    recipe = {"steps": steps, "batch": 4, "learning_rate": 5e-3, "weight_decay": 1.0, "seed": seed}
    train(model, torch.tensor(ids), Namespace(**recipe, threads=1))
    model.eval().requires_grad_(False)
    if family == text:
        return model
    whole = AutoConfig.for_model(
        family, text_config=config.to_dict(), vision_config=_VISION, **around
    )
    wrapper: PreTrainedModel = AutoModelForImageTextToText.from_config(whole).eval()
    wrapper.requires_grad_(False)
    wrapper.model.language_model.load_state_dict(model.model.state_dict())
    wrapper.lm_head.load_state_dict(model.lm_head.state_dict())
    return wrapper
