"""What a config.json declares, checked before anything of its sizes is made: it is not trusted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hfprune_fast.checkpoint.config_experts import with_experts
from hfprune_fast.checkpoint.decilm import custom_config
from hfprune_fast.checkpoint.folder import TORCH_DTYPES, is_deeper, read_json_object
from hfprune_fast.checkpoint.pretrained import load_config
from hfprune_fast.errors import CheckpointError, UnsupportedModelError
from hfprune_fast.models.declared import family_of, family_type, text_part
from hfprune_fast.models.families import FAMILIES, NON_UNIFORM, Family
from hfprune_fast.models.registration import config_defaults

_MAX_CONFIG_BYTES, _MAX_DEPTH = 8 << 20, 16
# Beyond those of any model, and small enough that tables of such sizes are.
_MAX_SIZES = {
    "num_hidden_layers": 1000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "shared_intermediate_size": 1 << 24,
    "vocab_size": 1 << 28,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1 << 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 1 << 20),
    "max_position_embeddings": 1 << 40,
    "mamba_chunk_size": 1 << 12,
}
# Sizes of convolutions, linear attention and state-space layers.
_OF_LAYERS, _MAX_OF_LAYERS = ("mamba_", "linear_", "conv_", "block_"), 1 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder and refuse what this package cannot prune."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder} holds an adapter and no model; merge it into its model "
                "(merge_and_unload), save that, and give its folder"
            )
        raise CheckpointError(
            f"{folder} has no config.json; expected a model folder as save_pretrained writes it"
        )
    config = read_json_object(path, _MAX_CONFIG_BYTES)
    if is_deeper(config, _MAX_DEPTH):
        raise CheckpointError(f"{path} is nested more than {_MAX_DEPTH} levels deep")
    config = _with_text_type(path, dict(custom_config(path, config)))
    family_of(config)
    _check_is_causal(config)
    quantization = config.get("quantization_config", config.get("compression_config"))
    if quantization is not None:
        if isinstance(quantization, dict):
            quantization = quantization.get("quant_method")
        raise CheckpointError(
            f"{folder} is quantised ({quantization!s:.60}), so its neurons "
            "cannot be cut; prune the unquantised checkpoint and quantise the result"
        )
    text = text_config(path, config)
    _check_sizes(path, text)
    _check_widths(path, config, text)
    dtype_of(path, text)
    return config


def text_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the causal language model that is run, with its sizes."""
    text = text_part(_with_whole_text(path, config))
    family = family_type(text)
    defaults = config_defaults(family)
    needed = ["num_hidden_layers", "hidden_size", "vocab_size"]
    if family_of(text).experts is None:
        needed.append(FAMILIES[family].width)
    optional = ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    for key in (*needed, *optional, *FAMILIES[family].refused):
        if text.get(key) is None and defaults.get(key) is not None:
            text[key] = defaults[key]
    for key in needed:
        if key not in text:
            raise CheckpointError(f"{path} has no {key}")
    # `family_of` refuses what it cannot be right about, now that all is said.
    return with_experts(path, text, family_of(text), defaults)


def _with_text_type(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the model_type of its text, if its class alone says it."""
    if not _has_tower(config) or config.get("text_config") is None:
        return config
    if not isinstance(config["text_config"], dict):
        got = type(config["text_config"]).__name__
        raise CheckpointError(f"{path} has a text_config that is a {got}, expected an object")
    by_default = load_config(path.parent, {"model_type": family_type(config)}).text_config
    text = {"model_type": by_default.model_type, **config["text_config"]}
    return {**config, "text_config": text}


def _with_whole_text(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration with all of its text's, as the text's own class completes it.

    The class that the text runs as has other defaults.
    """
    if not _has_tower(config):
        return config
    folder, outer_type = path.parent, {"model_type": family_type(config)}
    declared = config.get("text_config")
    if declared is None:  # beside the others', in files of older versions
        own_type = load_config(folder, outer_type).text_config.model_type
        declared = {**config, "model_type": own_type}
    _check_sizes(path, declared)
    own = load_config(folder, declared).to_dict()
    own = {key: value for key, value in own.items() if value is not None}
    kept = ("dtype", "torch_dtype", "tie_word_embeddings")  # which any config may hold
    own |= {key: declared[key] for key in kept if key in declared}
    tie = "tie_word_embeddings"  # the whole model's counts, for which its class has rules
    given = {tie: config[tie]} if tie in config else {}
    outer = load_config(folder, {**outer_type, "text_config": own, **given})
    return {**config, "text_config": own, tie: outer.tie_word_embeddings}


def _check_is_causal(config: Mapping[str, Any]) -> None:
    """Refuse what was saved with another head: a classifier, a reward model."""
    declared = config.get("architectures")
    names = [str(name) for name in declared] if isinstance(declared, list) else []
    heads = ("ForCausalLM", *(["ForConditionalGeneration"] if _has_tower(config) else []))
    if any("For" in name for name in names) and not any(name.endswith(heads) for name in names):
        raise UnsupportedModelError(
            f"{names[0]:.100} is no causal language model, so it has no "
            "output distribution to score by; give the language model that it was made from"
        )


def _has_tower(config: Mapping[str, Any]) -> bool:
    family = FAMILIES.get(str(family_type(config)))
    return family is not None and family.tower is not None


def _check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    of_layers = {
        key: _MAX_OF_LAYERS
        for key, value in config.items()
        if key.startswith(_OF_LAYERS) and type(value) is int
    }
    for key, largest in {**of_layers, **_MAX_SIZES}.items():
        value = config.get(key)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise CheckpointError(
                f"{path} has {key} {value!r:.60}, expected a positive integer, {largest} at most"
            )
    heads = config.get("num_attention_heads") or 1
    if heads % (config.get("num_key_value_heads") or 1):
        raise CheckpointError(
            f"{path} has num_key_value_heads {config['num_key_value_heads']}, which does not "
            f"divide num_attention_heads {heads}"
        )
    vocab, padding = config.get("vocab_size"), config.get("pad_token_id")
    if isinstance(padding, int) and vocab and not -vocab <= padding < vocab:
        raise CheckpointError(
            f"{path} has pad_token_id {padding!r:.60}, expected null or less than "
            f"vocab_size {vocab}; correct it there"
        )


def dtype_of(path: Path, config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a configuration declares, float32 by default."""
    declared = config.get("dtype") or config.get("torch_dtype") or "float32"
    known = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}
    if not isinstance(declared, str) or declared.removeprefix("torch.") not in {*known, "auto"}:
        raise CheckpointError(
            f"{path} has dtype {declared!r:.60}, expected one of {', '.join(known)}"
        )
    return known.get(declared.removeprefix("torch."), torch.float32)


def per_layer_config(widths: Sequence[int]) -> dict[str, dict[str, int]]:
    """Return the width of each layer's MLP in transformers' own notation."""
    return {str(layer): {"intermediate_size": width} for layer, width in enumerate(widths)}


def declares_widths(family: Family) -> bool:
    """Return whether a family's widths stand in `per_layer_config` too, as transformers has it."""
    return family.tower is None and not family.own_layers and family.width == "intermediate_size"


def _check_widths(path: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Refuse declared widths of layers that no MLP can have.

    Args:
        config: config.json.
        text: what `text_config` makes of it.
    """
    family = family_of(text)
    if family.experts is not None:  # which says them by other keys
        return
    layers, widest = text["num_hidden_layers"], text[family.width]
    widths: Any = [widest] * layers
    declared = None
    if str(config["model_type"]).startswith(NON_UNIFORM):
        widths = widths if config.get("mlp_widths") is None else config["mlp_widths"]
        declared = config.get("per_layer_config") if declares_widths(family) else None
    elif text.get("per_layer_config") and not family.own_layers:  # transformers' own notation
        try:
            by_layer = {int(i): dict(of) for i, of in text["per_layer_config"].items()}
        except (AttributeError, TypeError, ValueError):
            by_layer = {-1: {}}
        if any(set(of) != {"intermediate_size"} for of in by_layer.values()):
            raise CheckpointError(
                f"{path} has a per_layer_config that is not {{layer: "
                '{"intermediate_size": width}}, and nothing else is known here'
            )
        unset = {"intermediate_size": widest}
        widths = [by_layer.get(i, unset)["intermediate_size"] for i in range(layers)]
    ok = isinstance(widths, list) and len(widths) == layers
    if not ok or not all(type(w) is int and 1 <= w <= widest for w in widths):
        raise CheckpointError(
            f"{path} must have an MLP width in 1..{widest} for each of its "
            f"{layers} layers, got {widths!r:.60}"
        )
    if declared is not None and declared != per_layer_config(widths):
        raise CheckpointError(
            f"{path} has a per_layer_config that does not say what mlp_widths says, "
            f"{widths!r:.60}; delete per_layer_config there if mlp_widths is right"
        )
