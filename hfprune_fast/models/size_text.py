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


def experts_text(count: int, dense_count: int, width: int, dense_width: int) -> str:
    """Say how many experts a layer keeps, and how many neurons each, of how many."""
    neurons = f"{width} of {dense_width} neurons" if width < dense_width else f"all {width} neurons"
    return f"{count} of {dense_count} experts, {neurons} of each"


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
