"""Sizes of a model as human-readable text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# The multiples that formats need in the rows of down_proj; other rows stay in 16 bits and the file
# grows.
_TAKEN_BY = (
    ("K-quants such as Q4_K", 256),
    ("int4 groups of 128", 128),
    ("nf4", 64),
    ("Q4_0 and Q8_0", 32),
)


def widths_text(widths: Sequence[int]) -> str:
    """Return widths as human-readable text: 61, or 40 to 61 (mean 50.3)."""
    if len(set(widths)) == 1:
        return str(widths[0])
    return f"{min(widths)} to {max(widths)} (mean {sum(widths) / len(widths):.1f})"


def widths_in(achieved: Mapping[str, Any]) -> list[int]:
    """Return the widths of all kinds of MLPs that `ModelSpec.pruned_to` has achieved."""
    own = achieved.get("mlp_widths", [achieved["intermediate_size"]])
    of_experts = [achieved["expert_width"]] if "expert_width" in achieved else []
    return [width for width in (*own, *of_experts) if width]


def kept_text(
    widths: Sequence[int], dense_widths: Sequence[int], experts: Sequence[int] = ()
) -> str:
    """Say how many neurons layers keep of how many: 61 of 96, or 40 to 61 (mean 50.3) of 96.

    Args:
        widths, dense_widths: of the layers' own MLPs; 0 where there is none.
        experts: of a model that has any, how many a layer keeps, of how many, and each one's width
            and dense width.
    """
    own, dense = ([width for width in each if width] for each in (widths, dense_widths))
    neurons = f"{widths_text(own)} of {widths_text(dense)}" if own else ""
    if not experts:
        return neurons
    count, dense_count, width, dense_width = experts
    of_each = f"{width} of {dense_width} neurons" if width < dense_width else f"all {width} neurons"
    others = f" and {neurons} neurons of other MLPs" if own else ""
    return f"{count} of {dense_count} experts, {of_each} of each{others}"


def neurons_text(achieved: Mapping[str, Any]) -> str:
    """Say as `kept_text` does what `ModelSpec.pruned_to` has achieved."""
    names = ("experts", "dense_experts", "expert_width", "dense_expert_width")
    text = kept_text(
        achieved.get("mlp_widths", [achieved["intermediate_size"]]),
        achieved.get("dense_mlp_widths", [achieved["dense_intermediate_size"]]),
        [achieved[name] for name in names] if "experts" in achieved else (),
    )
    padded = achieved.get("layout") == "padded"
    return text + (", padded with zeros to the widest" if padded else "")


def suits_text(widths: Sequence[int]) -> str:
    """Say which quantisers and how much tensor parallelism MLPs of these widths suit."""
    step = math.gcd(*widths)
    step &= -step  # the power of two in it
    takes = [name for name, multiple in _TAKEN_BY if step % multiple == 0]
    misses = [f"{name} ({multiple})" for name, multiple in _TAKEN_BY if step % multiple != 0]
    parallel = [str(n) for n in (2, 4, 8) if step % n == 0]
    if parallel:
        takes.append(f"tensor parallelism over {', '.join(parallel)}")
    multiples = f"widths are multiples of {step}" if step > 1 else "widths are odd"
    suits = f"suit {'; '.join(takes)}" if takes else "suit no quantiser"
    return f"{multiples}: they {suits}" + (f"; not {', '.join(misses)}" if misses else "")
