"""How neurons are chosen and what is done about those that stay: one switch each, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hfprune_fast.errors import ArgumentError

SELECTS = ("obs", "statistic")
ALLOCATIONS = ("auto", "uniform", "global")
DATA_FREE = ("magnitude", "random")


@dataclass(frozen=True)
class Recipe:
    """A way to prune. The default is what did best in bench/results/fidelity.

    Args:
        criterion: what to score by, see `score_job.CRITERIA`; or "magnitude" or "random", which
            take no data.
        select: rank by "obs", what a removal costs when the other neurons are refitted, or by a
            "statistic" of the criterion.
        statistic: which one; None is the criterion's default.
        allocation: "uniform" or "global" (see `selection`), or "auto": uniform, global or halfway,
            whichever is closest to the dense model on calibration text that was not fitted to.
        refit: fit down_proj of what is left to the dense model, by least squares.
        steps: score and remove in so many parts.
    """

    criterion: str = "fisher"
    select: str = "obs"
    statistic: str | None = None
    allocation: str = "auto"
    refit: bool = True
    steps: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("select", self.select, SELECTS),
            ("allocation", self.allocation, ALLOCATIONS),
        ):
            if value not in known:
                raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.select == "obs" and self.criterion != "fisher":
            raise ArgumentError(
                f"select obs needs criterion fisher, got {self.criterion}; "
                "--select statistic ranks by it"
            )
        if self.select == "obs" and self.statistic is not None:
            raise ArgumentError(f"select obs ranks by no statistic, got {self.statistic}")
        if self.allocation == "auto" and not self.refit:
            raise ArgumentError(
                "allocation auto is measured after a refit; choose another, or refit"
            )
        if self.steps < 1:
            raise ArgumentError(f"steps must be at least 1, got {self.steps}")

    @property
    def ranks_by(self) -> str | None:
        """The statistic of the table."""
        return "obs" if self.select == "obs" else self.statistic


PRESETS = {
    "default": Recipe(),
    "paper": Recipe("entropy", "statistic", "l1", "uniform", refit=False),
}


def resolve(
    preset: str,
    asked: Mapping[str, Any],
    scored: tuple[tuple[str, ...], bool] | None = None,
    *,
    fits: bool = True,
) -> Recipe:
    """Return a preset's recipe with what was asked for in its place.

    What was left open follows the rest: the default recipe ranks by what the scores hold, by a
    statistic if a criterion without removal costs or a statistic was asked for, and neither refits
    nor measures allocations where there is nothing to fit to.

    Args:
        preset: a name in PRESETS.
        asked: fields of Recipe; None leaves one open.
        scored: of scores that are there, their criteria, and whether they have removal costs.
        fits: whether there is a calibration text.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    values = asdict(PRESETS[preset])
    if preset == "default" and scored is not None:
        values["criterion"] = scored[0][0]
    values["criterion"] = given.get("criterion", values["criterion"])
    has_costs = values["criterion"] == "fisher" and (scored is None or scored[1])
    if not has_costs or "statistic" in given:
        values["select"] = "statistic"
    values["refit"] = given.get("refit", values["refit"] and fits)
    if values["allocation"] == "auto" and not values["refit"]:
        values["allocation"] = "uniform"
    return Recipe(**{**values, **given})
