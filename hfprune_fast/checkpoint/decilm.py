"""DeciLM's layout: config.json says what each layer is, as vLLM and NVIDIA's tools read it.

Tensors have the family's names. vLLM's DeciLM is its Llama with a width for each layer, so it runs
llama, mistral (without a sliding window) and qwen2 (with biases on q, k and v).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_fast.errors import ArgumentError, CheckpointError
from hfprune_fast.models.families import NON_UNIFORM

MODEL_TYPE = "nemotron-nas"
CODE = Path(__file__).parents[1] / "models" / "configuration_decilm.py"
_FAMILIES = ("llama", "mistral", "qwen2")
# What DeciLM needs to be told of a family, in whose own config it does not stand.
_SAID = {"qwen2": {"attention_bias": False, "qkv_bias": True}}
_FAMILY = "hfprune_family"  # what the model was, to read it back


def config_of(config: Mapping[str, Any], family: str, widths: Sequence[int]) -> dict[str, Any]:
    """Return the family's config.json in DeciLM's layout, for MLPs of these widths."""
    sliding = config.get("sliding_window") and config.get("use_sliding_window", True)
    if family not in _FAMILIES or sliding:
        what = f"{family} with a sliding window" if family in _FAMILIES else family
        raise ArgumentError(
            f"layout decilm runs {', '.join(_FAMILIES)}, and what it runs knows no {what}; "
            "use custom or padded"
        )
    heads = config["num_attention_heads"]
    attention = {
        "n_heads_in_group": heads // (config.get("num_key_value_heads") or heads),
        "no_op": False,
        "replace_with_linear": False,
    }
    # Not ffn_mult, which readers round up to multiples of 256.
    activation = config.get("hidden_act", "silu")  # the default of these families
    ffn = {"hidden_act": activation, "no_op": False, "replace_with_linear": False}
    return {
        **config,
        **_SAID.get(family, {}),
        "architectures": ["DeciLMForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": f"{CODE.stem}.DeciLMConfig"},
        "block_configs": [
            {"attention": attention, "ffn": {**ffn, "intermediate_size": width}} for width in widths
        ],
        _FAMILY: family,
    }


def custom_config(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what `config_of` was made of, in the custom layout; any other config as it is."""
    if config.get("model_type") != MODEL_TYPE:
        return config
    family, blocks = config.get(_FAMILY), config.get("block_configs")
    if family not in _FAMILIES or not isinstance(blocks, list):
        raise CheckpointError(
            f"{path} is of model_type {MODEL_TYPE} and was not written by hfprune, so it is not "
            "known what each layer is"
        )
    try:
        widths = [block["ffn"]["intermediate_size"] for block in blocks]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{path} has block_configs without an ffn.intermediate_size for each layer"
        ) from None
    gone = {"block_configs", "auto_map", _FAMILY, *_SAID.get(str(family), {})}
    kept = {key: value for key, value in config.items() if key not in gone}
    return {**kept, "model_type": f"{NON_UNIFORM}{family}", "mlp_widths": widths}
