"""The ridge that is chosen, in a few directions of a wide output, and what is refused."""

import pytest
import torch
from refit_truth import plain_fit

from hfprune_fast.engine.planner import RIDGE_DIRECTIONS
from hfprune_fast.errors import NumericsError
from hfprune_fast.pruning.normal_equations import NormalEquations
from hfprune_fast.scoring.obs import REFIT_RIDGE


@pytest.mark.parametrize(("noise", "expected"), [(0.02, 0.01), (30.0, 3.0)])
def test_of_a_wide_output(noise: float, expected: float) -> None:
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float64)

    width, tokens, held = 3 * RIDGE_DIRECTIONS, 200, 40
    acts, down = normal(tokens, 24), normal(width, 24)
    wanted = acts @ (down + 0.5 * normal(width, 24)).t() + noise * normal(tokens, width)
    equations = NormalEquations(down)
    equations.add(acts[:150], wanted[:150])
    equations.add(acts[150:], wanted[150:], held_out=held)
    found = equations.solve(0)
    assert torch.allclose(found, plain_fit(acts, wanted, down, held), rtol=1e-9)
    pull = expected * acts.square().sum(0)
    gram = acts.t() @ acts + pull.diag()
    own = torch.linalg.solve(gram, acts.t() @ wanted + pull[:, None] * down.t()).t()
    assert torch.allclose(found, own, rtol=1e-9)


@pytest.mark.parametrize("silent", [slice(-40, None), slice(-40)], ids=["held out", "fitted"])
def test_acts_that_are_all_0_choose_none(silent: slice) -> None:
    """All ridges are alike there; the weakest is not better for that."""
    drawn = torch.Generator().manual_seed(0)
    acts, down, noise = (torch.randn(n, 8, generator=drawn).double() for n in (200, 6, 200))
    wanted = acts @ down.t() + 9 * noise[:, :6]
    acts[silent] = 0
    equations = NormalEquations(down)
    equations.add(acts, wanted, held_out=40)
    pull = REFIT_RIDGE * acts.square().sum(0)
    own = torch.linalg.solve(
        acts.t() @ acts + pull.diag(), acts.t() @ wanted + pull[:, None] * down.t()
    ).t()
    assert torch.allclose(equations.solve(0), own, rtol=1e-9)


@pytest.mark.parametrize("held_out", [0, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_stream_that_is_not_finite_is_refused(held_out: int, value: float) -> None:
    """Of a layer whose acts are, such as the last one of a model that overflows in float16."""
    acts, wanted, down = torch.ones(200, 8), torch.ones(200, 6), torch.ones(6, 8)
    wanted[-1, 2] = value
    equations = NormalEquations(down)
    equations.add(acts, wanted, held_out=held_out)
    with pytest.raises(NumericsError, match="NaN or inf in the residual stream of layer 3; try"):
        equations.solve(3)
