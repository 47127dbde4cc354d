"""hfprune prune: `hf.oneshot` with progress bars, and the summary printed at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfprune_fast.commands import evaluate
from hfprune_fast.models.size_text import neurons_text, suits_text, widths_in
from hfprune_fast.pruning.oneshot import oneshot


def run(
    model: str, calibration: str | None, out: Path, *, preset: str, **options: Any
) -> dict[str, Any]:
    """Write a smaller checkpoint and return what was achieved, as `oneshot` does."""
    return oneshot(
        model, calibration, out, recipe=preset, distributed=True, progress=True, **options
    )


def text(result: dict[str, Any], model: str) -> str:
    """Return what `run` did as human-readable text."""
    dense, width = result["dense_intermediate_size"], result["intermediate_size"]
    widths = f"intermediate_size {dense} -> {width}"
    if "experts" in result:
        widths = f"a layer has {neurons_text(result)}"
    elif {"mlp_widths", "dense_mlp_widths"} & result.keys():
        widths = f"MLP neurons a layer {neurons_text(result)}"
    loading = ""
    if result.get("layout") == "custom":  # which transformers does not know
        plainly = "--allocation uniform makes a plain checkpoint"
        if "dense_mlp_widths" in result:
            plainly = "`hfprune export --to padded` makes a plain checkpoint"
        loading = (
            "loads with transformers after `import hfprune_fast`, or with trust_remote_code=True; "
            f"{plainly}\n"
        )
    ending = f"next: hfprune evaluate {model} {result['out']} --text SOURCE"
    if "fidelity" in result:
        ending = evaluate.text(result["fidelity"])
    if "report" in result:
        ending += f"\nreport               {result['report']}"
    return (
        f"{result['out']}: {widths} ({result['prune_ratio']:.2%} of the neurons), "
        f"{result['dense_params']:,} -> {result['params']:,} parameters "
        f"({result['param_ratio']:.2%} removed)\n{suits_text(widths_in(result))}\n"
        f"{loading}{ending}"
    )
