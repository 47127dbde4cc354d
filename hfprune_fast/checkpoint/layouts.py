"""How a checkpoint declares MLPs of different widths.

    custom   classes of `nonuniform`, shipped in the folder; config.json has `mlp_widths`, and the
             same as `per_layer_config`
    native   the family's class and transformers' `per_layer_config`, where it builds such layers
    decilm   DeciLM's, which vLLM and NVIDIA's tools read (`checkpoint.decilm`)
    padded   zero neurons up to the widest layer: a uniform model of the family

`intermediate_size` is the widest in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint import decilm
from hfprune_fast.checkpoint.config_json import declares_widths, per_layer_config, text_config
from hfprune_fast.checkpoint.pretrained import load_config
from hfprune_fast.checkpoint.skeleton import skeleton
from hfprune_fast.errors import ArgumentError, one_line
from hfprune_fast.models.declared import family_of, family_type
from hfprune_fast.models.families import NON_UNIFORM
from hfprune_fast.models.kept import KeptExperts, size_keys
from hfprune_fast.models.registration import class_names, main_class
from hfprune_fast.models.sites import parts_of

CODE = Path(__file__).parents[1] / "models" / "nonuniform.py"
CODE_FILE = "modeling_hfprune.py"
_TRIED_NATIVELY = ("llama", "mistral", "qwen2", "qwen3")  # all build their layers alike


def config_of(
    config: Mapping[str, Any],
    widths: Sequence[int],
    layout: str,
    experts: KeptExperts | None = None,
) -> dict[str, Any]:
    """Return a checkpoint's config.json for MLPs of these widths.

    Args:
        experts: of a model that has any, which has no layout but uniform; widths are not used then.
    """
    model_type, family = family_type(config), family_of(config)
    pruned = {**config, "model_type": model_type}
    for key in ("auto_map", "mlp_widths"):  # code of another's is not carried
        pruned.pop(key, None)
    if config["model_type"] != model_type:
        pruned["architectures"] = [main_class(model_type)]
    text = pruned
    if family.tower is not None and isinstance(config.get("text_config"), Mapping):
        text = pruned["text_config"] = dict(config["text_config"])
    if experts is not None:
        text.update(size_keys(family, experts, text.keys()))
        return pruned
    text[family.width] = max(widths)
    for key, value in family.with_width.items():
        text.pop(key, None)
        if value is not None:
            text[key] = value
    if not family.own_layers:
        text.pop("per_layer_config", None)
    if layout == "padded" or len(set(widths)) == 1:
        return pruned
    if layout == "decilm":
        return decilm.config_of(pruned, model_type, widths)
    if layout == "native":
        return {**pruned, "per_layer_config": per_layer_config(widths)}
    module = Path(CODE_FILE).stem
    classes = {auto: f"{module}.HFPrune{name}" for auto, name in class_names(model_type).items()}
    custom = {
        **pruned,
        "model_type": NON_UNIFORM + model_type,
        "architectures": [f"HFPrune{main_class(model_type)}"],
        "auto_map": classes,
        "mlp_widths": list(widths),
    }
    if declares_widths(family):
        custom["per_layer_config"] = per_layer_config(widths)
    return custom


def code_files(config: Mapping[str, Any]) -> set[str]:
    """Return the files of a checkpoint's folder that hold copies of `nonuniform`."""
    if not str(config["model_type"]).startswith(NON_UNIFORM):
        return set()
    auto_map = config.get("auto_map")
    names = auto_map.values() if isinstance(auto_map, dict) else ()
    modules = [str(name).partition(".")[0] for name in names]
    return {decilm.CODE.name, *(f"{module}.py" for module in modules)}


def shipped_code(layout: str) -> dict[str, Path]:
    """Return the files that a layout needs beside the weights, by their names there."""
    return {"custom": {CODE_FILE: CODE}, "decilm": {decilm.CODE.name: decilm.CODE}}.get(layout, {})


def check_layout(config: Mapping[str, Any], layout: str) -> None:
    """Refuse a layout that this model cannot have, whatever its widths will be."""
    if layout != "uniform" and family_of(config).experts is not None:
        raise ArgumentError(
            f"layout {layout}: the layers of a model with experts are all of one size, which needs "
            "no layout; leave it out"
        )
    layers = text_config(Path("config.json"), config)["num_hidden_layers"]
    widths = [2, *[1] * (layers - 1)]
    if layout == "native":
        check_native(config, widths)
    elif layout == "decilm":
        config_of(config, widths, layout)


def native_families() -> list[str]:
    """Return the families that the installed transformers builds with a width per layer."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 8, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    found = []
    for family in _TRIED_NATIVELY:
        with suppress(ArgumentError):
            check_layout({"model_type": family, **sizes, **heads}, "native")
            found.append(family)
    return found


def check_native(config: Mapping[str, Any], widths: Sequence[int]) -> None:
    """Refuse a native layout that the installed transformers does not build."""
    import transformers

    family = family_of(config)
    pruned = config_of(config, widths, "native")
    reason = "its MLPs are all of one width"
    if not declares_widths(family):
        raise ArgumentError(
            f"layout native: {pruned['model_type']} does not take the widths of its MLPs from "
            "per_layer_config; use layout custom or padded"
        )
    try:
        model = skeleton(load_config(Path(), pruned))
        if list(parts_of(model).widths.values()) == list(widths):
            return
    except Exception as error:  # whatever a version that does not know it raises
        reason = one_line(error)
    raise ArgumentError(
        f"layout native: transformers {transformers.__version__} does not build "
        f"{pruned['model_type']} with a width per layer ({reason}); use layout custom or padded"
    )
