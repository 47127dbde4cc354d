"""What people read: tables for the terminal and the model card."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from hfprune_fast._version import __version__

PAPER = "arXiv 2603.08083"


def say(message: str) -> None:
    """Print one line to the user on stderr, past a progress bar."""
    tqdm.write(f"hfprune: {message}", file=sys.stderr)


@contextmanager
def byte_bar(what: str, total_bytes: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """Count bytes on stderr: the function that is yielded takes those that are done."""
    with tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not show,
    ) as bar:
        yield bar.update


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


def model_card(record: dict[str, Any]) -> str:
    """Return README.md of a pruned checkpoint, from the record that becomes its hfprune.json."""
    base_model, achieved = record["base_model"], record["achieved"]
    provenance = record.get("provenance", {})
    rows = [
        ("base model", base_model),
        (
            "MLP neurons a layer",
            f"{achieved['intermediate_size']} of {achieved['dense_intermediate_size']}",
        ),
        ("neurons removed", f"{achieved['prune_ratio']:.2%}"),
        ("parameters", f"{achieved['params']:,} of {achieved['dense_params']:,}"),
        ("parameters removed", f"{achieved['param_ratio']:.2%}"),
    ]
    if "statistic" in record.get("asked", {}):
        rows.append(("ranked by", f"output entropy, statistic `{record['asked']['statistic']}`"))
    calibration = provenance.get("calibration")
    if isinstance(calibration, dict) and "source" in calibration:
        rows.append(("calibration", str(calibration["source"])))
    if {"samples", "tokens"} <= provenance.keys():
        size = f"{provenance['samples']} samples, {provenance['tokens']} tokens"
        rows.append(("calibration size", size))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    on_hub = f"base_model: {base_model}\n" if "/" in base_model else ""
    return f"""---
library_name: transformers
{on_hub}tags: [pruned, hfprune]
---

# {base_model.split("/")[-1]}, pruned

MLP neurons were cut out with hfprune_fast {__version__}, after HFPrune ({PAPER}). The
architecture is unchanged; only `intermediate_size` is smaller. No training followed.

| | |
|---|---|
{table}

Load it with `AutoModelForCausalLM.from_pretrained`. Which neurons were kept, and by what they were
chosen, is in `hfprune.json`.
"""
