from typing import Any

import pytest

from hfprune_fast.config import PRESETS, Recipe, resolve
from hfprune_fast.errors import ArgumentError

PAPER = PRESETS["paper"]
COSTS = (("fisher", "entropy"), True)
NO_COSTS = (("entropy",), False)


@pytest.mark.parametrize(
    ("preset", "asked", "scored", "fits", "expected"),
    [
        ("default", {}, None, True, Recipe()),
        ("default", {}, COSTS, True, Recipe()),
        ("default", {}, None, False, Recipe(allocation="uniform", refit=False)),
        ("default", {}, NO_COSTS, True, Recipe("entropy", "statistic")),
        ("default", {}, NO_COSTS, False, Recipe("entropy", "statistic", None, "uniform", False)),
        ("default", {"criterion": "entropy"}, COSTS, True, Recipe("entropy", "statistic")),
        ("default", {"statistic": "l2"}, None, True, Recipe("fisher", "statistic", "l2")),
        ("default", {}, (("fisher", "entropy"), False), True, Recipe("fisher", "statistic")),
        ("default", {}, (("entropy", "fisher"), True), True, Recipe("entropy", "statistic")),
        ("default", {"criterion": "fisher"}, (("entropy", "fisher"), True), True, Recipe()),
        ("default", {"criterion": "fisher"}, NO_COSTS, True, Recipe("fisher", "statistic")),
        ("default", {"criterion": "random"}, None, False,
         Recipe("random", "statistic", None, "uniform", False)),
        ("default", {"select": "statistic"}, None, True, Recipe("fisher", "statistic")),
        ("default", {"select": "statistic", "steps": 2}, COSTS, False,
         Recipe("fisher", "statistic", None, "uniform", False, 2)),
        ("default", {"allocation": "uniform"}, None, True, Recipe(allocation="uniform")),
        ("default", {"refit": False}, None, True, Recipe(allocation="uniform", refit=False)),
        (
            "default", {"refit": False, "allocation": "global"}, None, True,
            Recipe(allocation="global", refit=False),
        ),
        ("paper", {}, None, True, PAPER),
        ("paper", {}, COSTS, True, PAPER),
        ("paper", {"refit": True}, None, True, Recipe("entropy", "statistic", "l1", "uniform")),
        ("paper", {"criterion": None, "steps": 3}, None, True,
         Recipe("entropy", "statistic", "l1", "uniform", False, 3)),
    ],
)  # fmt: skip
def test_what_is_open_follows_the_rest(
    preset: str, asked: dict[str, Any], scored: Any, fits: bool, expected: Recipe
) -> None:
    assert resolve(preset, asked, scored, fits=fits) == expected


def test_what_was_asked_for_is_never_put_aside() -> None:
    for asked in (
        {"criterion": "entropy", "select": "obs"},
        {"statistic": "l2", "select": "obs"},
        {"allocation": "auto", "refit": False},
        {"allocation": "auto"},
    ):
        with pytest.raises(ArgumentError):
            resolve("default", asked, fits=False)


def test_ranking_is_by_removal_costs_or_by_a_statistic() -> None:
    assert Recipe().ranks_by == "obs"
    assert PAPER.ranks_by == "l1"
    assert Recipe("fisher", "statistic").ranks_by is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "best"}, "select must be one of obs, statistic, got 'best'"),
        ({"allocation": "half"}, "allocation must be one of auto, uniform, global"),
        ({"criterion": "entropy"}, "select obs needs criterion fisher, got entropy"),
        ({"statistic": "l1"}, "select obs ranks by no statistic, got l1"),
        ({"refit": False}, "allocation auto is measured after a refit"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Recipe(**fields)
