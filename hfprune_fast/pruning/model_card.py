"""The model card of a pruned checkpoint."""

from __future__ import annotations

import re
from typing import Any

from hfprune_fast._version import __version__
from hfprune_fast.models.spec import suits_text, widths_text

PAPER = "arXiv 2603.08083"
_MAX_CHARS = 200  # of a name

# What each layout changes in the architecture, and what loading it takes beyond transformers.
_CHANGED = {
    "uniform": "The\narchitecture is unchanged; only `intermediate_size` is smaller.",
    "custom": "Layers have\ndifferent widths, `mlp_widths` in config.json.",
    "decilm": "Layers have\ndifferent widths, `block_configs` in config.json (DeciLM's layout).",
    "native": "Layers have\ndifferent widths, `per_layer_config` in config.json.",
    "padded": "Narrower\nlayers are filled up with zero neurons, which add nothing to the output "
    "but take time and memory\nlike any others: the model is as large as if all layers were as "
    "wide as the widest.",
}
_LOADING = {
    "custom": " after `import hfprune_fast`, or with\n`trust_remote_code=True`, which runs this "
    "folder's `modeling_hfprune.py`",
}


def neurons_text(achieved: dict[str, Any]) -> str:
    """Say how many neurons layers kept of how many: 61 of 96, or 40 to 61 (mean 50.3) of 96."""
    kept = achieved.get("mlp_widths", [achieved["intermediate_size"]])
    dense = achieved.get("dense_mlp_widths", [achieved["dense_intermediate_size"]])
    padding = ", padded with zeros to the widest" if achieved.get("layout") == "padded" else ""
    return f"{widths_text(kept)} of {widths_text(dense)}{padding}"


def _recipe_rows(requested: dict[str, Any], chosen: dict[str, Any]) -> list[tuple[str, str]]:
    """Say how the neurons were chosen, and what became of the others."""
    if requested["select"] == "obs":
        ranked = "what a removal costs when the others are refitted (criterion `fisher`)"
    else:
        ranked = f"criterion `{requested['criterion']}`"
        ranked += f", statistic `{requested['statistic']}`" if requested["statistic"] else ""
    allocation = chosen.get("allocation", requested["allocation"])
    shares = {0.0: "uniform", 0.5: "halfway between uniform and global", 1.0: "global"}
    rows = [("ranked by", ranked), ("allocation", shares.get(allocation, str(allocation)))]
    if requested["refit"]:
        rows.append(("down_proj", "refitted to the dense model by least squares"))
    return rows


def escaped(text: str) -> str:
    """Return a text that Markdown and HTML show as it is, on one line; a tab is shown as \\t."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:_MAX_CHARS])
    return re.sub(r"([\\`*_{}\[\]<>()#!|~$&@:])", r"\\\1", shown)


def model_card(record: dict[str, Any]) -> str:
    """Return README.md of a pruned checkpoint, from the record that becomes its hfprune.json."""
    base_model, achieved = record["base_model"], record["achieved"]
    provenance = record.get("provenance", {})
    rows = [
        ("base model", escaped(base_model)),
        ("MLP neurons a layer", neurons_text(achieved)),
        ("neurons removed", f"{achieved['prune_ratio']:.2%}"),
        ("widths", suits_text(achieved.get("mlp_widths", [achieved["intermediate_size"]]))),
        ("parameters", f"{achieved['params']:,} of {achieved['dense_params']:,}"),
        ("parameters removed", f"{achieved['param_ratio']:.2%}"),
    ]
    if "criterion" in record.get("requested", {}):
        rows += _recipe_rows(record["requested"], record.get("chosen", {}))
    calibration = provenance.get("calibration")
    if isinstance(calibration, dict) and "source" in calibration:
        rows.append(("calibration", escaped(str(calibration["source"]))))
    if {"samples", "tokens"} <= provenance.keys():
        size = f"{provenance['samples']} samples, {provenance['tokens']} tokens"
        rows.append(("calibration size", escaped(size)))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    layout = achieved.get("layout", "uniform")
    by = f"hfprune_fast {__version__}, after HFPrune ({PAPER})"
    loading = f"Load it with `AutoModelForCausalLM.from_pretrained`{_LOADING.get(layout, '')}."
    if layout == "decilm":
        loading = "Load it with vLLM, `--trust-remote-code`; transformers has no class for it."
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base_model, re.ASCII)
    on_hub = f"base_model: {base_model}\n" if is_hub_name else ""
    return f"""---
library_name: transformers
{on_hub}tags: [pruned, hfprune]
---

# {escaped(base_model.split("/")[-1])}, pruned

MLP neurons were cut out with {by}. {_CHANGED[layout]}
No training followed.

| | |
|---|---|
{table}

{loading} Which neurons were kept, and by what they were
chosen, is in `hfprune.json`.
"""
