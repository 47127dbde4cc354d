"""The ways to prune that `fidelity.py` compares, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A row of the table: a recipe, with names for rankings that are not one of `hfprune prune`."""

    criterion: str  # "entropy, parity" is the paper's arithmetic in bf16
    statistic: str  # "obs" ranks by removal costs
    allocation: str = "uniform"
    refit: bool = False
    dropped_by: str = ""  # what experts are ranked by, where some are dropped
    correction: str = ""  # in place of a refit, what another method does: bias, grail
    rounded: bool = False  # to widths that quantisers take, as by --round-to auto

    def __str__(self) -> str:
        experts = f"experts by {self.dropped_by}" if self.dropped_by else ""
        ranking = f"{self.criterion} {self.statistic}".strip()
        refit = "refit" if self.refit else self.correction
        parts = [experts, ranking, refit, self.allocation, "rounded" if self.rounded else ""]
        return ", ".join(part for part in parts if part not in ("", "uniform"))


def variant_of(row: Mapping[str, Any]) -> Variant:
    """Return the variant of a row, of older files too, which called fisher_mask mask."""
    found = {field.name: row[field.name] for field in fields(Variant) if field.name in row}
    if found["statistic"] == "mask":
        found["statistic"] = "fisher_mask"
    return Variant(**found)


# The others are compared with the paper's, so it is measured first. `auto` chooses between UNIFORM
# and MEASURED.
PAPER = Variant("entropy", "l1")
DEFAULT = Variant("fisher", "obs", "auto", refit=True)
UNIFORM = Variant("fisher", "obs", refit=True)
MEASURED = Variant("fisher", "obs", "measured", refit=True)
ROUNDED = replace(DEFAULT, rounded=True)  # in all within half a step of DEFAULT's widths
RANDOM, MAGNITUDE = Variant("random", "uniform"), Variant("magnitude", "weight_norm")
_RANKED = (("entropy", "l1"), ("fisher", "l2"), ("fisher", "obs"))
# Other authors' methods, by bench/baselines. FLAP is its own form, with the global threshold; its
# ablation by layer is there too, as the threshold may do harm.
WANDA_SP = Variant("wanda_sp", "weight × act")
FLAP = Variant("flap", "fluctuation", "global", correction="bias")
WANDA_GRAIL, FLAP_GRAIL = (replace(each, correction="grail") for each in (WANDA_SP, FLAP))
IN_TURN = tuple(replace(each, correction="grail, in turn") for each in (WANDA_SP, FLAP))
LLM_PRUNER, SDMPRUNE = Variant("llm_pruner", "taylor"), Variant("sdmprune", "two steps")
FLAP_BY_LAYER = replace(FLAP, allocation="uniform")
PUBLISHED = (WANDA_SP, FLAP, FLAP_BY_LAYER, WANDA_GRAIL, FLAP_GRAIL, *IN_TURN, LLM_PRUNER, SDMPRUNE)
CRITERIA_OF_OTHERS = frozenset(variant.criterion for variant in PUBLISHED)
BASELINES = (PAPER, MAGNITUDE, RANDOM, *PUBLISHED, UNIFORM, DEFAULT, MEASURED, ROUNDED)
VARIANTS = (
    PAPER,
    Variant("entropy, parity", "l1"),
    *(Variant("entropy", statistic) for statistic in ("l2", "fisher_mask")),
    *(Variant("cross_entropy", statistic) for statistic in ("l1", "l2", "fisher_mask")),
    *(Variant("self_distillation", statistic) for statistic in ("l1", "l2", "fisher_mask")),
    *(Variant("fisher", statistic) for statistic in ("l1", "l2", "fisher_mask", "obs")),
    Variant("activation", "act"),
    MAGNITUDE,
    RANDOM,
    *(Variant(*ranked, "global") for ranked in _RANKED),
    *(Variant(*ranked, each, refit=True) for each in ("uniform", "global") for ranked in _RANKED),
    Variant("activation", "act", refit=True),
    DEFAULT,
    MEASURED,
    ROUNDED,
    *PUBLISHED,
)
# For a real model over several seeds: the paper's recipe, other criteria by rank alone, the two
# closest other methods, ours, and what each part of it gives.
CORE = (
    PAPER, *(Variant(each, "l1") for each in ("fisher", "cross_entropy", "self_distillation")),
    *(Variant(each, "l2") for each in ("entropy", "fisher")), WANDA_GRAIL, FLAP_GRAIL, UNIFORM,
    DEFAULT, replace(PAPER, allocation="global"), replace(PAPER, refit=True),
    replace(UNIFORM, refit=False),
)  # fmt: skip
QUICK = (PAPER, Variant("fisher", "l2"), RANDOM, UNIFORM, DEFAULT)


def dropped(by: str, refit: bool) -> Variant:
    """Return a variant of a model with experts that drops some and narrows none."""
    return Variant("", "", "", refit, by)


# Of models with experts. Allocation "experts" narrows these alone, "uniform" shared ones as well.
MIXTURE_RATIOS = (0.25, 0.5)
_BY = ("fisher taylor", "entropy taylor", "reap", "count", "random")
_BOTH = (("entropy", "l1", "entropy taylor"), ("fisher", "obs", "fisher taylor"))
_WITHOUT_AND_WITH = (False, True)
MIXTURES = (
    *(dropped(by, refit) for refit in _WITHOUT_AND_WITH for by in _BY),
    Variant("random", "uniform", "experts"),
    *(Variant(*ranked, "experts", refit) for refit in _WITHOUT_AND_WITH for ranked in _RANKED),
    Variant("entropy", "l1"),
    Variant("fisher", "obs", refit=True),
    *(
        Variant(criterion, statistic, "uniform", refit, by)
        for refit in _WITHOUT_AND_WITH
        for criterion, statistic, by in _BOTH
    ),
)
QUICK_MIXTURES = (
    dropped("fisher taylor", True), dropped("random", False),
    Variant("entropy", "l1", "experts"), MIXTURES[-1],
)  # fmt: skip
