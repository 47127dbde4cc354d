"""What people read: tables for the terminal and the model card."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from hfprune_fast._version import __version__
from hfprune_fast.architectures import widths_text
from hfprune_fast.errors import ArgumentError

PAPER = "arXiv 2603.08083"


_muted = False


def mute() -> None:
    """Say and show nothing from now on: another process of this run does."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """Print one line to the user on stderr, past a progress bar."""
    if not _muted:
        tqdm.write(f"hfprune: {message}", file=sys.stderr)


@contextmanager
def byte_bar(what: str, total_bytes: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """Count bytes on stderr: the function that is yielded takes those that are done."""
    with _bar(what, total_bytes, "B", show) as bar:
        yield bar.update


def _bar(what: str, total: int, unit: str, show: bool) -> Any:
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not show or _muted,
    )


@contextmanager
def token_bar(
    what: str, total_tokens: int, show: bool, flops_per_token: int = 0
) -> Iterator[Callable[[float], None]]:
    """Count tokens on stderr, with FLOP/s and peak memory: the function that is yielded takes them.

    A token that has been through some of the layers counts for that part of it.
    """
    begun, peak_bytes, counted = time.perf_counter(), 0, 0.0
    with _bar(what, total_tokens, "tok", show) as bar:

        def done(tokens: float) -> None:
            nonlocal peak_bytes, counted
            counted += tokens
            if bar.disable:
                return
            peak_bytes = max(peak_bytes, _memory_bytes())
            notes = {"peak": human_bytes(peak_bytes)}
            if flops_per_token:
                flops = counted * flops_per_token / (time.perf_counter() - begun)
                notes["FLOP/s"] = tqdm.format_sizeof(flops)
            bar.set_postfix(notes, refresh=False)
            # Whole tokens, since the bar prints its count as it is.
            bar.update(min(round(counted), total_tokens) - bar.n)

        yield done


def _memory_bytes() -> int:
    """Return what this process has allocated: on its GPU if it uses one, else in memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


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


def human_seconds(seconds: float) -> str:
    """Seconds, minutes or hours: 3.4 min."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def parse_bytes(size: int | str, argument: str) -> int:
    """Return a size as bytes: 5GB and 5GiB, KB and KiB, MB and MiB are understood."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?\s*", str(size), re.IGNORECASE)
    count = 0
    if match is not None:
        base = 1024 if match[3] else 1000
        power = "KMGT".find((match[2] or "").upper()) + 1 if match[2] else 0
        count = int(float(match[1]) * base**power)
    if count < 1:
        raise ArgumentError(f"{argument} must be bytes or like 5GB or 512MiB, got {size!r}")
    return count


_CHANGED = {
    "uniform": "The\narchitecture is unchanged; only `intermediate_size` is smaller.",
    "custom": "Layers have\ndifferent widths, `mlp_widths` in config.json.",
    "native": "Layers have\ndifferent widths, `per_layer_config` in config.json.",
    "padded": "Narrower\nlayers are filled up with zero neurons, which add nothing to the output "
    "but take time and memory\nlike any others: the model is as large as if all layers were as "
    "wide as the widest.",
}
_PLAINLY = "Load it with `AutoModelForCausalLM.from_pretrained`."
_LOADING = {
    "uniform": _PLAINLY,
    "custom": "Load it with `AutoModelForCausalLM.from_pretrained` after `import hfprune_fast`, or "
    "with\n`trust_remote_code=True`, which runs this folder's `modeling_hfprune.py`.",
    "native": _PLAINLY,
    "padded": _PLAINLY,
}


def neurons_text(achieved: dict[str, Any]) -> str:
    """Say how many neurons layers kept of how many: 61 of 96, or 40 to 61 (mean 50.3) of 96."""
    kept = achieved.get("mlp_widths", [achieved["intermediate_size"]])
    dense = achieved.get("dense_mlp_widths", [achieved["dense_intermediate_size"]])
    padding = ", padded with zeros to the widest" if achieved.get("layout") == "padded" else ""
    return f"{widths_text(kept)} of {widths_text(dense)}{padding}"


def _recipe_rows(asked: dict[str, Any], chosen: dict[str, Any]) -> list[tuple[str, str]]:
    """Say how the neurons were chosen, and what became of the others."""
    if asked["select"] == "obs":
        ranked = "what a removal costs when the others are refitted (criterion `fisher`)"
    else:
        ranked = f"criterion `{asked['criterion']}`"
        ranked += f", statistic `{asked['statistic']}`" if asked["statistic"] else ""
    allocation = chosen.get("allocation", asked["allocation"])
    shares = {0.0: "uniform", 0.5: "halfway between uniform and global", 1.0: "global"}
    rows = [("ranked by", ranked), ("allocation", shares.get(allocation, str(allocation)))]
    if asked["refit"]:
        rows.append(("down_proj", "refitted to the dense model by least squares"))
    return rows


def model_card(record: dict[str, Any]) -> str:
    """Return README.md of a pruned checkpoint, from the record that becomes its hfprune.json."""
    base_model, achieved = record["base_model"], record["achieved"]
    provenance = record.get("provenance", {})
    rows = [
        ("base model", base_model),
        ("MLP neurons a layer", neurons_text(achieved)),
        ("neurons removed", f"{achieved['prune_ratio']:.2%}"),
        ("parameters", f"{achieved['params']:,} of {achieved['dense_params']:,}"),
        ("parameters removed", f"{achieved['param_ratio']:.2%}"),
    ]
    if "criterion" in record.get("asked", {}):
        rows += _recipe_rows(record["asked"], record.get("chosen", {}))
    calibration = provenance.get("calibration")
    if isinstance(calibration, dict) and "source" in calibration:
        rows.append(("calibration", str(calibration["source"])))
    if {"samples", "tokens"} <= provenance.keys():
        size = f"{provenance['samples']} samples, {provenance['tokens']} tokens"
        rows.append(("calibration size", size))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    layout = achieved.get("layout", "uniform")
    by = f"hfprune_fast {__version__}, after HFPrune ({PAPER})"
    on_hub = f"base_model: {base_model}\n" if "/" in base_model else ""
    return f"""---
library_name: transformers
{on_hub}tags: [pruned, hfprune]
---

# {base_model.split("/")[-1]}, pruned

MLP neurons were cut out with {by}. {_CHANGED[layout]}
No training followed.

| | |
|---|---|
{table}

{_LOADING[layout]} Which neurons were kept, and by what they were
chosen, is in `hfprune.json`.
"""
