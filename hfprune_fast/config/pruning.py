"""What is pruned, how much of it, and by what."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.options import LARGEST_COUNT, Options, option

CRITERIA = ("entropy", "cross_entropy", "fisher", "self_distillation", "activation")
DATA_FREE = ("magnitude", "random")
STATISTICS = ("l1", "l2", "fisher_mask", "act")
EXPERT_SCORES = ("taylor", "reap", "count")
ALLOCATIONS = ("auto", "uniform", "measured", "global")
MEASURED_ALLOCATIONS = ("auto", "measured")  # which run the model
SELECTS = ("obs", "statistic")
REFITS = ("linear", "reconstruct", "none")


@dataclass(frozen=True)
class Budget(Options):
    """How much to remove, and from which layers: one of the first three.

    For a model with experts it may be one of expert_ratio and experts instead, or one of each.
    """

    prune_ratio: float | None = option(None, "Fraction of MLP neurons to remove, in [0, 1).")
    param_ratio: float | None = option(None, "Fraction of ALL parameters to remove, in [0, 1).")
    intermediate_size: int | None = option(None, "The (mean) MLP width to prune to.")
    round_to: str | int = option(
        "auto",
        "Make widths multiples of this; auto is what quantisers take: 256 from a dense width of "
        "4096, 64 from 512, 32 below.",
        least=1,
        most=LARGEST_COUNT,
    )
    min_keep: float = option(
        0.05, "Each layer keeps at least this fraction of its neurons, unless the budget is lower.",
        least=0, most=1,
    )  # fmt: skip
    protect: tuple[int, ...] = option(
        (), "Layers that are not pruned, such as 0,1,31.", metavar="LAYERS"
    )
    expert_ratio: float | None = option(
        None, "Fraction of each layer's experts to drop, in [0, 1), before others are narrowed."
    )
    experts: int | None = option(
        None, "How many experts each layer keeps.", least=1, most=LARGEST_COUNT
    )
    expert_score: str = option(
        "taylor",
        "Rank experts by their Taylor term, by reap (mean of weight times output norm) or by how "
        "many tokens choose them.",
        choices=EXPERT_SCORES,
    )

    def __post_init__(self) -> None:
        if isinstance(self.round_to, str) and self.round_to.isdecimal():
            object.__setattr__(self, "round_to", int(self.round_to))
        super().__post_init__()
        if isinstance(self.round_to, str) and self.round_to != "auto":
            raise ArgumentError(
                f"round_to must be auto or a whole number, got {shown(self.round_to)}"
            )

    @property
    def size(self) -> dict[str, float | int]:
        """The budgets of widths that are given; `mean_width` takes exactly one."""
        sizes = {name: getattr(self, name) for name in BUDGETS}
        return {name: value for name, value in sizes.items() if value is not None}

    @property
    def of_experts(self) -> dict[str, float | int | str]:
        """What is given of experts, and how they are ranked; empty if nothing is."""
        given: dict[str, float | int | str] = {
            name: value
            for name, value in (("expert_ratio", self.expert_ratio), ("experts", self.experts))
            if value is not None
        }
        return {**given, "expert_score": self.expert_score} if given else {}


BUDGETS = ("prune_ratio", "param_ratio", "intermediate_size")


@dataclass(frozen=True)
class Recipe(Options):
    """How neurons are chosen and what is done with the others: one switch each.

    The default recipe is the one that did best in bench/results/fidelity.
    """

    criterion: str = option(
        "fisher", "What to score by; magnitude and random need no text.",
        choices=(*CRITERIA, *DATA_FREE),
    )  # fmt: skip
    select: str = option(
        "obs",
        "Rank by obs, the cost of a removal when the others are refitted, or by a statistic.",
        choices=SELECTS,
    )
    statistic: str | None = option(
        None, "The statistic to rank by; l1 is the paper's. [default: the criterion's own]",
        choices=STATISTICS,
    )  # fmt: skip
    allocation: str = option(
        "auto",
        "uniform: one width for all layers; global: one ranking across them; measured: the same, "
        "each layer's scores scaled by the KL that cutting it alone costs; auto: uniform or "
        "measured, whichever is closest to the dense model on held-out calibration text.",
        choices=ALLOCATIONS,
    )
    refit: str = option(
        "linear",
        "linear: fit down_proj to the dense model by least squares; reconstruct: and then train "
        "each layer's whole MLP to give the dense model's stream; none: leave weights as they are.",
        choices=REFITS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "obs" and self.criterion != "fisher":
            raise ArgumentError(
                f"select obs needs criterion fisher, got {self.criterion}; "
                "--select statistic ranks by it"
            )
        if self.select == "obs" and self.statistic is not None:
            raise ArgumentError(f"select obs ranks by no statistic, got {self.statistic}")
        if self.allocation in MEASURED_ALLOCATIONS and not self.refits:
            raise ArgumentError(
                f"allocation {self.allocation} is measured after a refit; choose another or refit"
            )

    @property
    def refits(self) -> bool:
        """Whether weights that stay are fitted to the dense model."""
        return self.refit != "none"

    @property
    def ranks_by(self) -> str | None:
        """The name of the statistic in the table; None is the criterion's default."""
        return "obs" if self.select == "obs" else self.statistic


def _all_optional(group: type[Any]) -> Any:
    """Return a class of the same fields that are all None by default."""
    return make_dataclass(
        f"{group.__name__}Changes",
        [
            (f.name, f.type, field(default=None, metadata={**f.metadata, "usual": f.default}))
            for f in fields(group)
        ],
        frozen=True,
    )


# Fields of a recipe that replace those of a preset where they are not None.
RecipeChanges: Any = _all_optional(Recipe)

PRESETS = {
    "default": Recipe(),
    "paper": Recipe("entropy", "statistic", "l1", "uniform", refit="none"),
}
