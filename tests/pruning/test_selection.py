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


importances = st.integers(1, 5).flatmap(
    lambda layers: st.lists(
        st.lists(st.integers(0, 9), min_size=13, max_size=13), min_size=layers, max_size=layers
    )
)


@given(importances, st.integers(1, 13), st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_allocation_keeps_as_many(
    rows: list[list[int]], width: int, step: int, allocation: float
) -> None:
    importance = torch.tensor(rows, dtype=torch.float64)
    width = max(step, width // step * step)
    keep = kept_of(importance, width, allocation, min_keep=0.2, step=step)
    widths = [len(kept) for kept in keep.values()]
    assert sum(widths) == width * len(rows)
    assert all(w % step == 0 for w in widths)
    assert min(widths) >= min(width, 3)  # a fifth of 13, rounded up
    for row, kept in zip(importance, keep.values(), strict=True):
        gone = torch.ones(13, dtype=torch.bool)
        gone[kept] = False
        assert not gone.any() or float(row[kept].min()) >= float(row[gone].max())


def test_global_is_one_ranking() -> None:
    importance = torch.rand(4, 50, dtype=torch.float64)
    importance[1] *= 3
    keep = kept_of(importance, 20, "global", min_keep=0)
    threshold = importance.flatten().sort(descending=True).values[4 * 20 - 1]
    for layer, kept in keep.items():
        assert kept.tolist() == (importance[layer] >= threshold).nonzero().squeeze(1).tolist()
    halfway = kept_of(importance, 20, 0.5, min_keep=0)
    for layer, kept in halfway.items():
        assert abs(len(kept) - (20 + len(keep[layer])) / 2) < 1


@pytest.mark.parametrize(("dear", "widths"), [(5.0, [6, 2]), (7.0, [4, 4])])
def test_whole_blocks_are_dealt_by_their_mean(dear: float, widths: list[int]) -> None:
    """Layers of 7 in twos, the seventh in none; (3, 3) is worth more than (5, 0), not (7, 0)."""
    importance = torch.tensor(
        [[3, 9, 9, 0.5, 9, 9, 3], [0, 9, 0, dear, 0, 9, 0]], dtype=torch.float64
    )
    keep = kept_of(importance, 4, "global", min_keep=0, step=2)
    assert [len(k) for k in keep.values()] == widths
    assert keep[0].tolist() == ([0, 1, 2, 4, 5, 6] if dear == 5 else [1, 2, 4, 5])
    assert keep[1].tolist() == ([1, 5] if dear == 5 else [0, 1, 3, 5])


def test_parts_of_a_block_go_where_the_next_one_is_worth_most() -> None:
    importance = torch.zeros(3, 10, dtype=torch.float64)
    for layer, strong in enumerate((0, 3, 9)):  # with their floors a global ranking's widths
        importance[layer, :strong] = 5
    importance[1, 3:] = 1e-3
    keep = kept_of(importance, 4, "global", min_keep=0.1)
    assert [len(k) for k in keep.values()] == [1, 3, 8]
    # 4 + 0.3 · (-3, -1, 4) = 3.1, 3.7, 5.2, and the third's sixth neuron is worth more than the
    # second's fourth.
    assert [len(k) for k in kept_of(importance, 4, 0.3, min_keep=0.1).values()] == [3, 3, 6]


def test_a_floor_gives_way_to_the_width_and_leaves_no_layer_empty() -> None:
    importance = torch.stack([torch.full((20,), 1e-6), torch.rand(20) + 1, torch.rand(20) + 1])
    importance = importance.double()
    for min_keep, least in ((0, 1), (0.01, 1), (0.26, 6), (1, 7)):
        keep = kept_of(importance, 7, "global", min_keep=min_keep)
        assert len(keep[0]) == least
        assert sum(map(len, keep.values())) == 21
    in_blocks = kept_of(importance, 8, "global", min_keep=0.15, step=4)
    assert len(in_blocks[0]) == 4


def test_what_is_dense_stays_so() -> None:
    importance = torch.rand(3, 13, dtype=torch.float64)
    for allocation in ("uniform", "global", 0.5):
        for step in (1, 5):  # 13 is no multiple of 5, and nothing is to go
            keep = kept_of(importance, 13, allocation, step=step)
            assert [k.tolist() for k in keep.values()] == [list(range(13))] * 3


@given(importances, st.integers(1, 12), st.integers(1, 4), st.integers(0, 4))
def test_protected_layers_are_apart(
    rows: list[list[int]], width: int, step: int, protected: int
) -> None:
    """The others are what they would be if they were the whole model."""
    importance = torch.tensor([*rows, rows[0]], dtype=torch.float64)
    protected = min(protected, len(rows))
    width = max(step, width // step * step)
    keep = kept_of(importance, width, "global", protect=[protected], step=step)
    assert keep.pop(protected).tolist() == list(range(13))
    others = torch.cat([importance[:protected], importance[protected + 1 :]])
    alone = kept_of(others, width, "global", step=step)
    for kept, expected in zip(keep.values(), alone.values(), strict=True):
        assert torch.equal(kept, expected)


def test_a_layer_keeps_its_part_and_a_protected_one_all() -> None:
    importance = torch.arange(30, dtype=torch.float64).view(10, 3).t().contiguous()
    importance[0] = 1e-9
    widths = [len(k) for k in kept_of(importance, 6, "global", min_keep=0.25).values()]
    assert widths[0] == 3
    assert sum(widths) == 18
    protected = kept_of(importance, 6, "global", min_keep=0.25, protect=[0])
    assert [len(k) for k in protected.values()] == [10, 6, 6]
    assert [len(k) for k in kept_of(importance, 6, protect=[2]).values()] == [6, 6, 10]


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
