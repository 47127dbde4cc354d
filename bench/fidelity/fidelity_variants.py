"""The ways to prune that `fidelity.py` compares, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Way:
    """A row of the table: a recipe, with names for rankings that are not one of `hfprune prune`."""

    criterion: str  # "entropy, parity" is the paper's arithmetic in bf16
    statistic: str  # "obs" ranks by removal costs
    allocation: str = "uniform"
    refit: bool = False
    steps: int = 1

    def __str__(self) -> str:
        if self.criterion in ("activation", "magnitude", "random"):
            ranking = self.criterion
        else:
            criterion, _, rounded = self.criterion.partition(", ")
            ranking = f"{criterion} {self.statistic}" + (", bf16 parity" if rounded else "")
        parts = [
            ranking,
            *(["refit"] if self.refit else []),
            *([self.allocation] if self.allocation != "uniform" else []),
            *([f"{self.steps} steps"] if self.steps > 1 else []),
        ]
        return ", ".join(parts)


def way_of(row: Mapping[str, Any]) -> Way:
    """Return the way that a row is of; what it leaves out is the default."""
    return Way(**{field.name: row[field.name] for field in fields(Way) if field.name in row})


# The paper's is what the others are held against, so it is measured first. Of `auto`, uniform and
# global are two of the three that it chooses from.
PAPER = Way("entropy", "l1")
DEFAULT = Way("fisher", "obs", "auto", refit=True)
UNIFORM = Way("fisher", "obs", refit=True)
RANDOM, MAGNITUDE = Way("random", "uniform"), Way("magnitude", "weight_norm")
WAYS = (
    PAPER,
    Way("entropy, parity", "l1"),
    *(Way("entropy", statistic) for statistic in ("l2", "mask")),
    *(Way("cross_entropy", statistic) for statistic in ("l1", "l2", "mask")),
    *(Way("fisher", statistic) for statistic in ("l1", "l2", "mask", "obs")),
    Way("activation", "act"),
    MAGNITUDE,
    RANDOM,
    *(
        Way(*ranked, "global")
        for ranked in (("entropy", "l1"), ("fisher", "l2"), ("fisher", "obs"))
    ),
    *(
        Way(*ranked, allocation, refit=True)
        for allocation in ("uniform", "global")
        for ranked in (("entropy", "l1"), ("fisher", "l2"), ("fisher", "obs"))
    ),
    Way("activation", "act", refit=True),
    DEFAULT,
    Way("fisher", "obs", "auto", refit=True, steps=2),
)
QUICK = (PAPER, Way("fisher", "l2"), RANDOM, UNIFORM, DEFAULT)
# Steps score the model once more for each ratio, so they are measured at two.
STEPPED_RATIOS = (0.2, 0.5)
