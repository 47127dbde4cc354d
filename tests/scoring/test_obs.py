"""Removal costs against explicit solutions on small matrices, in float64."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from watch import Seeing

from hfprune_fast.errors import NumericsError
from hfprune_fast.scoring.obs import greedy_removal_costs

# Solutions of systems of F <= 40 with a condition number below 1e4 agree to eps · F · 1e4.
RTOL = 40 * 1e4 * torch.finfo(torch.float64).eps


def a_layer(width: int, hidden: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gram, weight and metric; the acts are correlated, the metric is of rank 2 less than full."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    acts = normal(4 * width, width) @ (torch.eye(width) + 0.3 * normal(width, width))
    grads = normal(max(1, hidden - 2), hidden)
    return acts.t() @ acts / len(acts), normal(hidden, width), grads.t() @ grads


def explicit_costs(gram: Tensor, weight: Tensor, metric: Tensor, ridge: float) -> Tensor:
    """Greedy removal, each candidate's constrained least squares solved anew."""
    width = len(gram)
    wide = gram + ridge * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)

    def error(left: list[int]) -> float:
        refitted = torch.zeros_like(weight)
        if left:
            kept = wide[left][:, left]
            refitted[:, left] = torch.linalg.solve(kept, (weight @ wide[:, left]).t()).t()
        lost = refitted - weight
        return float((metric @ lost @ wide @ lost.t()).trace())

    costs = torch.zeros(width, dtype=torch.float64)
    left, before, highest = list(range(width)), 0.0, 0.0
    while left:
        errors = {j: error([i for i in left if i != j]) for j in left}
        gone = min(errors, key=errors.__getitem__)
        highest = max(highest, errors[gone] - before)
        costs[gone], before = highest / 2, errors[gone]
        left.remove(gone)
    return costs


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("width", [1, 2, 17])
def test_costs_are_those_of_solving_anew(width: int, with_metric: bool, block: int) -> None:
    gram, weight, metric = a_layer(width)
    identity = torch.eye(len(weight), dtype=torch.float64)
    expected = explicit_costs(gram, weight, metric if with_metric else identity, 0.01)
    got = greedy_removal_costs(
        gram.clone(), weight, metric if with_metric else None, ridge=0.01, block=block
    )
    assert got.argsort().tolist() == expected.argsort().tolist()
    assert torch.allclose(got, expected, rtol=RTOL, atol=RTOL * float(expected.max()))


def test_a_removal_launches_little_and_reads_nothing_back() -> None:
    """On a GPU each operation is a launch, and each value that is read waits for the device."""

    class Launches(Seeing):
        def __init__(self) -> None:
            super().__init__()
            self.made: Counter[str] = Counter()

        def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
            if not func.is_view:
                self.made[func.name().partition(".")[0]] += 1

    made = []
    for width in (64, 128):  # one block each: what is made once a matrix cancels
        with Launches() as launches:
            greedy_removal_costs(*a_layer(width), block=128)
        made.append(launches.made)
    more = made[1] - made[0]
    assert more.total() <= 19 * 64
    assert more["aten::_local_scalar_dense"] == 0


@pytest.mark.parametrize("block", [1, 2])
def test_a_lower_later_cost_is_raised_to_the_earlier_one(block: int) -> None:
    """Of two that cancel, the first to go leaves the other with less to do: 3/4, then 1/4."""
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    costs = greedy_removal_costs(gram, weight, ridge=0, block=block)
    assert costs.tolist() == pytest.approx([3 / 8, 3 / 8], rel=1e-15)


def test_neurons_that_are_alike_cost_alike() -> None:
    """Uncorrelated acts: each costs ½(1 + λ)|w|², whatever the order of equal costs."""
    weight = torch.ones(4, 200, dtype=torch.float64)
    weight[:, 50:120] = 2
    costs = greedy_removal_costs(torch.eye(200, dtype=torch.float64), weight, ridge=0.25)
    expected = 0.5 * 1.25 * weight.square().sum(0)
    assert torch.allclose(costs, expected, rtol=200 * torch.finfo(torch.float64).eps, atol=0)


def test_outputs_with_a_zero_metric_cost_nothing() -> None:
    """A metric of rank 1 sees one direction; what rounding leaves of the rest is not negative."""
    gram, weight, _ = a_layer(30)
    unread = greedy_removal_costs(gram.clone(), weight, torch.zeros(6, 6, dtype=torch.float64))
    assert unread.tolist() == [0.0] * 30
    seen = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    costs = greedy_removal_costs(gram.clone(), weight, seen @ seen.t(), block=4)
    assert bool((costs >= 0).all())
    # The same as of an MLP whose only output is that direction.
    alone = greedy_removal_costs(gram.clone(), seen.t() @ weight)
    assert torch.allclose(costs, alone, rtol=RTOL, atol=RTOL * float(alone.max()))


def test_a_neuron_that_never_fires_or_writes_nothing_costs_nothing() -> None:
    gram, weight, _ = a_layer(8)
    gram[3], gram[:, 3] = 0, 0
    weight[:, 5] = 0
    costs = greedy_removal_costs(gram.clone(), weight, ridge=1e-9)
    assert costs[5] == 0
    assert costs[3] < 1e-6 * costs.median()


def test_acts_of_low_rank_in_many_dimensions() -> None:
    """Rank 20 of 300: the ridge alone holds the rest, and blocks change rounding alone."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(20, 300, dtype=torch.float64, generator=generator)
    weight = torch.randn(16, 300, dtype=torch.float64, generator=generator)
    gram = few.t() @ few / 20
    costs = [greedy_removal_costs(gram.clone(), weight, block=block) for block in (1, 7, 64)]
    assert bool((costs[0] > 0).all())
    for other in costs[1:]:
        assert torch.allclose(costs[0], other, rtol=1e-8)  # eps · F · condition 3e4


@pytest.mark.parametrize("spoiled", [torch.nan, -100.0])
def test_moments_of_no_act_are_refused(spoiled: float) -> None:
    gram, weight, _ = a_layer(5)
    gram[1, 1] = spoiled
    with pytest.raises(NumericsError, match="second moments"):
        greedy_removal_costs(gram.clone(), weight)
