"""What a parsed config.json declares: its family, and the part of it that is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hfprune_fast.errors import UnsupportedModelError
from hfprune_fast.models.families import FAMILIES, NON_UNIFORM, Family
from hfprune_fast.models.refused import REFUSED


def family_type(config: Mapping[str, Any]) -> Any:
    """Return the model_type of a parsed config.json's family."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type.removeprefix(NON_UNIFORM) in FAMILIES:
        return model_type.removeprefix(NON_UNIFORM)
    return model_type


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed config.json, or raise UnsupportedModelError.

    A model with a text tower has the tower's family, with its own paths.
    """
    model_type = family_type(config)
    family, why = FAMILIES.get(str(model_type)), REFUSED.get(str(model_type))
    if why is not None:
        raise _unsupported(config, f"{why} (model_type {model_type})")
    if family is None:
        first = ", ".join(list(FAMILIES)[:4])
        raise _unsupported(
            config,
            f"no gated MLP is known for model_type {model_type!r:.60}; supported are {first} and "
            f"{len(FAMILIES) - 4} more, of which docs/families.md is the list",
        )
    both_ways = config.get("use_bidirectional_attention") in (True, "all")
    if both_ways or config.get("is_causal") is False:
        raise _unsupported(
            config, "its tokens see later ones (is_causal, use_bidirectional_attention)"
        )
    for key, what in family.refused.items():
        if config.get(key):
            raise _unsupported(config, f"it has {what} ({key} {config[key]!r:.20})")
    if family.tower is None:
        without = family.experts is not None and family.experts.enabled
        if without and not config.get(without):
            return replace(family, experts=None)
        return family
    text = text_part(config)
    of_text = FAMILIES.get(str(family_type(text)))
    if of_text is not None and of_text.tower is not None:  # a tower has none of its own
        raise _unsupported(config, "its config.json has no text_config of another model_type")
    inner = family_of(text)
    scaled = inner.logit_scale or inner.logit_divisor or text.get(inner.softcap)
    if scaled and not family.tower.caps_logits:
        raise _unsupported(
            config,
            "the logits of its class are not those of its text tower, which are scaled or capped",
        )
    experts = inner.experts and replace(inner.experts, across=family.tower.across)
    return replace(inner, tower=family.tower, decoder=family.tower.decoder, experts=experts)


def _unsupported(config: Mapping[str, Any], why: str) -> UnsupportedModelError:
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else "this model"
    return UnsupportedModelError(f"{name!s:.100} is not supported: {why}")


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of what is run: that of a text tower, as the model that it runs as.

    A tower's is in `text_config`, or beside the others' in files of older versions.
    """
    model_type = family_type(config)
    family = FAMILIES.get(str(model_type))
    if family is None or family.tower is None:
        return dict(config)
    inner = config.get("text_config")
    text = dict(inner) if isinstance(inner, Mapping) else {**config, "model_type": model_type}
    of_text = text.get("model_type", "")
    text["model_type"] = family.tower.runs_as.get(str(of_text), of_text)
    text |= family.tower.sets
    for rope in ("rope_parameters", "rope_scaling"):
        if text["model_type"] != of_text and isinstance(text.get(rope), Mapping):
            text[rope] = _one_axis(text[rope])
    for key in ("architectures", "dtype", "torch_dtype", "tokenizer_class"):
        if key in config:
            text.setdefault(key, config[key])
    if "tie_word_embeddings" in config:  # the whole model's counts
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    if config["model_type"] != model_type:  # layers of different widths
        text["model_type"] = NON_UNIFORM + str(text["model_type"])
        text["mlp_widths"] = config.get("mlp_widths")
    return text


def _one_axis(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters for text, whose positions are the same on all axes."""
    kept = {key: v for key, v in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if v == "mrope" else v for key, v in kept.items()}
