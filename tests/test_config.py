import inspect
from dataclasses import fields
from typing import Any

import pytest

import hfprune_fast as hf
from hfprune_fast.config import (
    CRITERIA,
    DATA_FREE,
    PRESETS,
    Budget,
    CalibrationOptions,
    OutputOptions,
    PruningCalibration,
    Recipe,
    RunOptions,
    ScoringOptions,
)
from hfprune_fast.errors import ArgumentError
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.recipe import resolve_recipe
from hfprune_fast.scoring import criteria, table

PAPER = PRESETS["paper"]
COSTS = (("fisher", "entropy"), True)
NO_COSTS = (("entropy",), False)


@pytest.mark.parametrize(
    ("preset", "changes", "scored", "fits", "expected"),
    [
        ("default", {}, None, True, Recipe()),
        ("default", {}, COSTS, True, Recipe()),
        ("default", {}, None, False, Recipe(allocation="uniform", refit="none")),
        ("default", {}, NO_COSTS, True, Recipe("entropy", "statistic")),
        ("default", {}, NO_COSTS, False, Recipe("entropy", "statistic", None, "uniform", "none")),
        ("default", {"criterion": "entropy"}, COSTS, True, Recipe("entropy", "statistic")),
        ("default", {"statistic": "l2"}, None, True, Recipe("fisher", "statistic", "l2")),
        ("default", {}, (("fisher", "entropy"), False), True, Recipe("fisher", "statistic")),
        ("default", {}, (("entropy", "fisher"), True), True, Recipe()),
        ("default", {"statistic": "l2"}, (("entropy", "fisher"), True), True,
         Recipe("entropy", "statistic", "l2")),
        ("default", {"criterion": "fisher"}, (("entropy", "fisher"), True), True, Recipe()),
        ("default", {"criterion": "fisher"}, NO_COSTS, True, Recipe("fisher", "statistic")),
        ("default", {"criterion": "random"}, None, False,
         Recipe("random", "statistic", None, "uniform", "none")),
        ("default", {"select": "statistic"}, None, True, Recipe("fisher", "statistic")),
        ("default", {"select": "statistic",}, COSTS, False,
         Recipe("fisher", "statistic", None, "uniform", "none")),
        ("default", {"allocation": "uniform"}, None, True, Recipe(allocation="uniform")),
        ("default", {"refit": "none"}, None, True, Recipe(allocation="uniform", refit="none")),
        (
            "default", {"refit": "none", "allocation": "global"}, None, True,
            Recipe(allocation="global", refit="none"),
        ),
        ("paper", {}, None, True, PAPER),
        ("paper", {}, COSTS, True, PAPER),
        ("paper", {"refit": "linear"}, None, True, Recipe("entropy", "statistic", "l1", "uniform")),
        ("paper", {"criterion": None, "allocation": "global"}, None, True,
         Recipe("entropy", "statistic", "l1", "global", "none")),
        (Recipe(allocation="global"), {"refit": "none"}, NO_COSTS, False,
         Recipe(allocation="global", refit="none")),
    ],
)  # fmt: skip
def test_what_is_open_follows_the_rest(
    preset: str | Recipe, changes: dict[str, Any], scored: Any, fits: bool, expected: Recipe
) -> None:
    assert resolve_recipe(preset, changes, scored, has_text=fits) == expected


def test_requested_fields_are_never_overridden() -> None:
    for changes in (
        {"criterion": "entropy", "select": "obs"},
        {"statistic": "l2", "select": "obs"},
        {"allocation": "auto", "refit": "none"},
        {"allocation": "auto"},
    ):
        with pytest.raises(ArgumentError):
            resolve_recipe("default", changes, has_text=False)


def test_ranking_is_by_removal_costs_or_by_a_statistic() -> None:
    assert Recipe().ranks_by == "obs"
    assert PAPER.ranks_by == "l1"
    assert Recipe("fisher", "statistic").ranks_by is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "best"}, "select must be one of obs, statistic, got 'best'"),
        ({"allocation": "half"}, "allocation must be one of auto, uniform, measured, global"),
        ({"criterion": "entropy"}, "select obs needs criterion fisher, got entropy"),
        ({"statistic": "l1"}, "select obs ranks by no statistic, got l1"),
        ({"refit": "none"}, "allocation auto is measured after a refit"),
        ({"statistic": "mask"}, "statistic must be one of l1, l2, fisher_mask, act"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Recipe(**fields)


GROUPS = [PruningCalibration, RunOptions, ScoringOptions, Budget, OutputOptions, Recipe]


def test_functions_take_every_option_as_a_keyword() -> None:
    oneshot = inspect.signature(hf.oneshot).parameters
    for group in GROUPS:
        for field in fields(group):
            assert oneshot[field.name].default in (field.default, None)
            assert field.metadata["text"] in str(hf.oneshot.__doc__)
    names = [field.name for group in GROUPS for field in fields(group)]
    assert len(names) == len(set(names))  # so that they can be taken flat


@pytest.mark.parametrize(
    ("requested", "seq_len", "refitted", "samples"),
    [
        (None, 1024, 0, 128),
        (None, 1024, 4096, 128),
        (None, 1024, 4097, 129),
        (None, 1024, 14336, 448),
        (None, 256, 14336, 1792),
        (7, 1024, 14336, 7),
    ],
)
def test_how_many_samples_a_pruning_draws(
    requested: int | None, seq_len: int, refitted: int, samples: int
) -> None:
    assert PruningCalibration(requested).drawn(seq_len, refitted) == samples


def test_options_are_taken_flat_and_a_wrong_name_is_an_error() -> None:
    @keyword_options(run=RunOptions)
    def function(x: int, *, run: RunOptions) -> tuple[int, RunOptions]:
        return x, run

    assert function(3, device="cpu") == (3, RunOptions(device="cpu"))
    with pytest.raises(TypeError, match="devise"):
        function(3, devise="cpu")


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (CalibrationOptions, {"samples": 0}, "samples must be at least 1, got 0"),
        (RunOptions, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (RunOptions, {"offload": "moon"}, "offload must be one of auto, none, cpu, disk"),
        (OutputOptions, {"layout": "round"}, "layout must be one of auto, custom, native"),
        (OutputOptions, {"force": "no"}, "force must be True or False, got 'no'"),
        (ScoringOptions, {"parity": "false"}, "parity must be True or False, got 'false'"),
        (Recipe, {"refit": "no"}, "refit must be one of linear, reconstruct, none"),
        (ScoringOptions, {"backend": "cuda"}, "backend must be one of torch, triton"),
    ],
)
def test_options_out_of_range(group: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        group(**options)


def test_the_names_of_criteria_are_those_of_the_table_of_criteria() -> None:
    assert tuple(criteria.CRITERIA) == CRITERIA
    assert set(table.DEFAULT_STATISTIC) == {*CRITERIA, *DATA_FREE}
