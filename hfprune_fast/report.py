"""What people read: tables for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfprune_fast._version import __version__

PAPER = "arXiv 2603.08083"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def human_bytes(count: int) -> str:
    """Bytes in binary units: 3.4 MiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def model_card(base_model: str, result: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Return README.md of a pruned checkpoint."""
    calibration = provenance.get("calibration", {})
    rows = [
        ("base model", base_model),
        (
            "MLP neurons a layer",
            f"{result['intermediate_size']} of {result['dense_intermediate_size']}",
        ),
        ("neurons removed", f"{result['prune_ratio']:.2%}"),
        ("parameters", f"{result['params']:,} of {result['dense_params']:,}"),
        ("parameters removed", f"{result['param_ratio']:.2%}"),
        ("criterion", f"entropy of the model's own output, statistic `{result['statistic']}`"),
        ("calibration", f"{calibration.get('source', 'token batches')}"),
        (
            "calibration size",
            f"{provenance.get('samples')} samples, {provenance.get('tokens')} tokens",
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
base_model: {base_model}
tags: [pruned, hfprune]
---

# {base_model.rstrip("/").split("/")[-1]}, pruned

MLP neurons were ranked by the first-order Taylor term of the model's output entropy
(HFPrune, {PAPER}) and the least important were cut out with hfprune_fast {__version__}. The
architecture is unchanged; only `intermediate_size` is smaller.

| | |
|---|---|
{table}

Load it with `AutoModelForCausalLM.from_pretrained`. Which neurons were kept, and what they were
chosen by, is in `hfprune.json`. No training followed the pruning.
"""
