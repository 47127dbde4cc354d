from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from widths import kept_of

import hfprune_fast as hf
from hfprune_fast.config import Budget
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.size_text import suits_text
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.selection import WidthBudget

# meta-llama/Llama-2-7b: 20 % and 30 % of all parameters are the paper's widths.
LLAMA_2_7B = ModelSpec("llama", 32, 4096, 11008, 6_738_415_616, 6_607_077_376, 3 * 4096)


def widths_of(
    spec: ModelSpec = LLAMA_2_7B, allocation: str | float = "uniform", **budget: Any
) -> list[int]:
    """Widths for an importance of which the layers differ."""
    layers = torch.arange(spec.num_layers, dtype=torch.float64)[:, None]
    importance = (layers + 2).expand(-1, spec.intermediate_size)
    widths = WidthBudget.of(spec, Budget(**{"round_to": 1, **budget}))
    kept = [len(k) for k in widths.keep(importance, allocation).values()]
    if allocation == 0:
        assert sorted(widths.even_widths()) == sorted(kept)
    return kept


def width_of(spec: ModelSpec = LLAMA_2_7B, **budget: Any) -> int:
    (width,) = set(widths_of(spec, **budget))
    return width


def size_of_width(width: int, layers: int = 2) -> ModelSpec:
    mlps = layers * width * 24
    return ModelSpec("llama", layers, 8, width, mlps + 1000, mlps + 500, 24)


def table_of(l1: torch.Tensor) -> hf.ImportanceTable:
    size = size_of_width(l1.shape[1])
    ones = torch.ones_like(l1)
    statistics = {
        "entropy.l1": l1,
        "entropy.l2": l1 * 2,
        "entropy.fisher_mask": l1.flip(1),
        "act": ones,
        "down_norm": l1 + 1,
    }
    return hf.ImportanceTable(statistics, size, {})


def test_the_papers_widths() -> None:
    assert width_of(param_ratio=0.2) == 7581
    assert width_of(param_ratio=0.3) == 5867
    assert width_of(param_ratio=0.2, round_to=128) == 7552
    assert width_of(prune_ratio=0.2) == 8806


def test_the_most_important_are_kept_sorted_by_index() -> None:
    l1 = torch.tensor([[5.0, 1, 4, 2, 3], [1, 2, 3, 4, 5]], dtype=torch.float64)
    keep = hf.select(table_of(l1), intermediate_size=3)
    assert {layer: k.tolist() for layer, k in keep.items()} == {0: [0, 2, 4], 1: [2, 3, 4]}
    assert keep[0].dtype == torch.int64
    by_mask = hf.select(table_of(l1), intermediate_size=1, statistic="fisher_mask")
    assert [k.tolist() for k in by_mask.values()] == [[4], [0]]
    by_act = hf.select(table_of(l1), intermediate_size=1, statistic="act")  # norm of down column
    assert [k.tolist() for k in by_act.values()] == [[0], [4]]


def test_ties_are_broken_by_index() -> None:
    keep = kept_of(torch.zeros(2, 1000, dtype=torch.float64), 700)
    assert keep[0].tolist() == keep[1].tolist() == list(range(700))


@given(
    width=st.integers(1, 400),
    ratio=st.floats(0, 1, exclude_max=True),
    step=st.integers(1, 500),
)
def test_rounding_stays_within_one_step(width: int, ratio: float, step: int) -> None:
    size = size_of_width(width)
    exact = width * (1 - ratio)
    if step > width and exact != width:
        with pytest.raises(ArgumentError, match="round_to"):
            width_of(size, prune_ratio=ratio, round_to=step)
        return
    got = width_of(size, prune_ratio=ratio, round_to=step)
    assert 1 <= got <= width
    assert got % step == 0 or exact == width
    # A width below half a step is raised to one step: no layer is left without neurons.
    assert abs(got - exact) < step or got == step


@pytest.mark.parametrize(
    ("dense", "ratio", "step", "uniform", "together"),
    [
        (11008, 0.2, 256, 8704, 32 * 8806.4),
        (4096, 0.2, 256, 3328, 32 * 3276.8),
        (1536, 0.2, 64, 1216, 32 * 1228.8),
        (512, 0.3, 64, 384, 32 * 358.4),
        (384, 0.2, 32, 320, 32 * 307.2),
        (96, 0.2, 8, 80, 32 * 76.8),
        (13, 0.2, 1, 10, 32 * 10.4),
    ],
)
def test_widths_suit_quantisers_and_together_meet_the_budget(
    dense: int, ratio: float, step: int, uniform: int, together: float
) -> None:
    size = size_of_width(dense, layers=32)
    options: dict[str, Any] = {"prune_ratio": ratio, "round_to": "auto"}
    assert width_of(size, **options) == uniform
    for allocation in (0, 0.3, 0.5, "global"):
        widths = widths_of(size, allocation, **options)
        assert all(width % step == 0 for width in widths)
        assert max(widths) <= dense
        assert abs(sum(widths) - together) <= step / 2
    even = widths_of(size, 0, **options)
    assert max(even) - min(even) <= step
    assert even == sorted(even)  # what is left goes to the layers that gain most


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ([512, 1024], "multiples of 512: they suit K-quants such as Q4_K; int4 groups of 128; nf4"),
        ([352], "multiples of 32: they suit Q4_0 and Q8_0; tensor parallelism over 2, 4, 8; not K"),
        ([12, 8], "multiples of 4: they suit tensor parallelism over 2, 4; not K-quants such as"),
        ([61, 96], "widths are odd: they suit no quantiser; not K-quants such as Q4_K (256), int4"),
    ],
)
def test_what_widths_suit(widths: list[int], said: str) -> None:
    assert said in suits_text(widths)


def test_a_width_that_is_named_is_kept() -> None:
    size = size_of_width(1536, layers=4)
    for named, step in ((1216, 64), (1200, 16), (1201, 1)):
        assert width_of(size, intermediate_size=named, round_to="auto") == named
        widths = widths_of(size, "global", intermediate_size=named, round_to="auto")
        assert sum(widths) == 4 * named
        assert all(width % step == 0 for width in widths)


def test_nothing_requested_nothing_cut() -> None:
    assert width_of(size_of_width(172), prune_ratio=0.0, round_to=128) == 172
    assert width_of(size_of_width(172), intermediate_size=172) == 172


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune_ratio": 1.0}, r"prune_ratio must be in \[0, 1\), got 1.0"),
        ({"prune_ratio": -0.1}, r"\[0, 1\)"),
        ({"prune_ratio": float("nan")}, "prune_ratio must be a number or None, got nan"),
        ({"param_ratio": 1.5}, r"param_ratio must be in"),
        ({"param_ratio": 0.9}, r"param_ratio 0.9 cannot be reached: the MLPs hold at most 0\.64"),
        ({"intermediate_size": 0}, r"1\.\.11008"),
        ({"intermediate_size": 11468}, r"1\.\.11008 \(the dense width\), got 11468"),
        ({"prune_ratio": 0.2, "param_ratio": 0.2}, "exactly one of .* got prune_ratio and param"),
        ({}, "exactly one of .* got none"),
        ({"prune_ratio": 0.2, "round_to": 0}, "round_to must be at least 1, got 0"),
        (
            {"prune_ratio": 0.2, "round_to": "even"},
            "round_to must be auto or a whole number, got 'even'",
        ),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        width_of(**arguments)


def test_unknown_statistic() -> None:
    with pytest.raises(ArgumentError, match="statistic must be one of l1, l2, fisher_mask, act"):
        hf.select(table_of(torch.ones(2, 4).double()), prune_ratio=0.5, statistic="l3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "fair"}, "allocation must be uniform, global or a number .*got 'fair'"),
        ({"allocation": 1.5}, "allocation must be"),
        ({"allocation": "auto"}, "allocation must be .*got 'auto'"),
        ({"allocation": None}, "allocation must be .*got None"),
        ({"allocation": float("nan")}, "allocation must be .*got nan"),
        ({"allocation": "global", "min_keep": 2}, r"min_keep must be in \[0, 1\], got 2"),
        ({"protect": [2]}, r"protect names layer 2; the model has 0\.\.1"),
        ({"protect": [0, 1]}, "protect names every layer"),
        ({"criterion": "fisher"}, "by entropy, not by fisher"),
    ],
)
def test_what_an_allocation_cannot_be(options: dict[str, Any], message: str) -> None:
    table = table_of(torch.rand(2, 6, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=message):
        hf.select(table, intermediate_size=3, **options)
