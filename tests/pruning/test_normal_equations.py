"""The ridge that is chosen in a few directions of a wide output is that of all of them."""

import pytest
import torch
from refit_truth import plain_fit

from hfprune_fast.engine.planner import RIDGE_DIRECTIONS
from hfprune_fast.pruning.normal_equations import NormalEquations


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
