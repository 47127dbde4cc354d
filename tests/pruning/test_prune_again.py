"""What was pruned is pruned again: a model whose layers differ in width."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from uneven import WIDTHS
from widths import kept_of

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.config import Budget
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.selection import WidthBudget

# Of layers that differ in width, as those of a pruned model do.
DIFFERENT = (12, 5, 9, 2, 16)
ragged = st.lists(st.integers(0, 9), min_size=sum(DIFFERENT), max_size=sum(DIFFERENT))


def rows_of(values: list[int]) -> list[torch.Tensor]:
    return list(torch.tensor(values, dtype=torch.float64).split(list(DIFFERENT)))


@given(ragged, st.integers(2, 8), st.integers(1, 3), st.sampled_from(["global", 0.5, 0.0]))
def test_different_widths_are_cut_by_every_allocation(
    values: list[int], mean: int, step: int, allocation: str | float
) -> None:
    rows = rows_of(values)
    keep = kept_of(rows, mean, allocation, min_keep=0.25, step=step)
    widths = [len(kept) for kept in keep.values()]
    narrow = [width < step for width in DIFFERENT]  # which stay as they are
    cut = [width for width, stays in zip(DIFFERENT, narrow, strict=True) if not stays]
    requested = Fraction(sum(cut) * mean * len(DIFFERENT), sum(DIFFERENT) * step)  # in blocks
    most = sum(width // step for width in cut)
    blocks = sum(w // step for w, stays in zip(widths, narrow, strict=True) if not stays)
    assert abs(blocks - min(max(requested, len(cut)), most)) <= Fraction(1, 2)
    for width, dense, stays in zip(widths, DIFFERENT, narrow, strict=True):
        assert width == dense if stays else width % step == 0 and step <= width <= dense
    for row, kept in zip(rows, keep.values(), strict=True):
        best = row.sort(descending=True, stable=True).indices[: len(kept)]
        assert kept.tolist() == best.sort().values.tolist()


def test_uniform_keeps_the_same_fraction_of_different_widths() -> None:
    rows = rows_of(list(range(sum(DIFFERENT))))
    half = sum(DIFFERENT) / len(DIFFERENT) / 2
    halved = kept_of(rows, half, min_keep=1)  # of which uniform takes no notice
    assert [len(k) for k in halved.values()] == [6, 3, 5, 1, 8]
    assert [len(k) for k in kept_of(rows, half, protect=[4]).values()] == [6, 3, 5, 1, 16]
    even = kept_of(rows, half, 0.0)
    assert sum(map(len, even.values())) == 22
    assert all(
        abs(len(k) - width / 2) < 1 for k, width in zip(even.values(), DIFFERENT, strict=True)
    )


def test_global_is_one_ranking_of_different_widths() -> None:
    rows = [torch.rand(width, dtype=torch.float64) * (1 + i) for i, width in enumerate(DIFFERENT)]
    keep = kept_of(rows, 6, "global", min_keep=0)
    threshold = torch.cat(rows).sort(descending=True).values[6 * len(DIFFERENT) - 1]
    assert sum(map(len, keep.values())) == 6 * len(DIFFERENT)
    for row, kept in zip(rows, keep.values(), strict=True):
        best = (row >= threshold).nonzero().squeeze(1).tolist()
        assert kept.tolist() == (best or [int(row.argmax())])


def test_budgets_of_different_widths() -> None:
    widths = (40, 64, 16)
    spec = ModelSpec("llama", 3, 8, 64, 120 * 24 + 1000, 120 * 24 + 500, 24, mlp_widths=widths)

    def kept(**budget: Any) -> list[int]:
        of = WidthBudget.of(spec, Budget(**{"round_to": 1, **budget}))
        return [len(k) for k in of.keep(torch.rand(3, 64, dtype=torch.float64), "uniform").values()]

    assert kept(prune_ratio=0.25) == [30, 48, 12]
    assert kept(intermediate_size=20) == [20, 32, 8]
    assert kept(param_ratio=60 * 24 / spec.total_params) == [20, 32, 8]
    assert kept(prune_ratio=0.25, round_to=32) == [32, 64, 16]  # narrower than 32 stays
    assert WidthBudget.of(spec, Budget(prune_ratio=0.25)).ratio == pytest.approx(0.25)
    with pytest.raises(ArgumentError, match=r"must be in 1\.\.40 \(the dense mean width\), got 41"):
        kept(intermediate_size=41)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_smaller_model_is_the_masked_one(
    pruned: Callable[..., Path], tmp_path: Path, allocation: str
) -> None:
    once, twice = pruned(), tmp_path / "twice"
    text, options = tmp_path / "ids.npy", {"recipe": "paper", "round_to": 4}
    np.save(text, torch.arange(128).view(4, 32).remainder(127).numpy())
    done = hf.oneshot(once, text, twice, prune_ratio=0.4, allocation=allocation, **options)
    assert done["dense_mlp_widths"] == list(WIDTHS)
    record = json.loads((twice / "hfprune.json").read_text())
    masked, ids = load_model(once, device="cpu"), torch.arange(48).view(2, 24)
    for layer, width in enumerate(WIDTHS):
        kept = record["keep"][f"model.layers.{layer}.mlp"]
        assert len(kept) == done["mlp_widths"][layer] <= width
        gone = torch.ones(width, dtype=torch.bool)
        gone[kept] = False
        with torch.no_grad():
            masked.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight[:, gone] = 0
    with torch.no_grad():
        expected, got = masked(ids).logits, load_model(twice, device="cpu")(ids).logits
    # The same products, summed in another order.
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())
