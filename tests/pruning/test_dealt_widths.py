"""How many neurons an allocation deals to each layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from widths import kept_of

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
