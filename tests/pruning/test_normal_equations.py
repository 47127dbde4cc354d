"""The fit, the ridge that is chosen in a few directions of a wide output, and what is refused."""

import pytest
import torch
from refit_truth import plain_fit

from hfprune_fast.engine.planner import RIDGE_DIRECTIONS
from hfprune_fast.errors import NumericsError
from hfprune_fast.pruning.normal_equations import DEFAULT_RIDGE, NormalEquations, least_squares

# Solutions of systems of K <= 12 with a condition number below 1e4 agree to eps · K · 1e4.
RTOL = 12 * 1e4 * torch.finfo(torch.float64).eps


def moments(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gram of correlated acts, (K, K), and a weight, (6, K)."""
    drawn = torch.Generator().manual_seed(0)
    acts, mixing, weight = (
        torch.randn(rows, width, dtype=torch.float64, generator=drawn)
        for rows in (4 * width, width, 6)
    )
    acts = acts @ (torch.eye(width) + 0.3 * mixing)
    return acts.t() @ acts / len(acts), weight


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
    pull = DEFAULT_RIDGE * acts.square().sum(0)
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


def test_the_fit_solves_the_augmented_system() -> None:
    """Least squares of acts above √(ridge Σ a_j²) rows that pull towards the weight."""
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(50, 7, dtype=torch.float64, generator=generator)
    wanted = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    gram, cross = acts.t() @ acts / 50, wanted.t() @ acts / 50
    pull = (0.3 * acts.square().sum(0)).sqrt()
    expected = torch.linalg.lstsq(
        torch.cat([acts, pull.diag()]),
        torch.cat([wanted, pull[:, None] * weight.t()]),
    ).solution.t()
    assert torch.allclose(
        least_squares(gram.clone(), cross, weight, ridge=0.3), expected, rtol=RTOL
    )


def test_the_fit_is_between_the_data_and_the_weight() -> None:
    gram, weight = moments(9)
    truth = weight.flip(1)
    exact = least_squares(gram.clone(), truth @ gram, weight, ridge=1e-13)
    assert torch.allclose(exact, truth, rtol=1e-6)
    assert torch.allclose(least_squares(gram.clone(), truth @ gram, weight, ridge=1e9), weight)
    nothing = torch.zeros_like(gram)  # no act ever fired
    assert torch.allclose(
        least_squares(nothing, torch.zeros_like(weight), weight, ridge=0.1), weight
    )


def test_scaled_acts_change_no_fit() -> None:
    """As where one neuron makes massive activations."""
    gram, weight = moments(12)
    scale = torch.ones(12, dtype=torch.float64)
    scale[4], scale[7] = 133, 1e-3
    wanted = weight.flip(1) @ gram
    fitted = least_squares(gram.clone(), wanted, weight, ridge=0.3)
    scaled = gram * scale * scale[:, None]
    found = least_squares(scaled, wanted * scale, weight / scale, ridge=0.3)
    assert torch.allclose(found * scale, fitted)


@pytest.mark.parametrize("spoiled", [torch.nan, -100.0])
def test_moments_of_no_act_are_refused(spoiled: float) -> None:
    gram, weight = moments(5)
    gram[1, 1] = spoiled
    with pytest.raises(NumericsError, match="second moments"):
        least_squares(gram, weight @ gram, weight, ridge=0.1)


def test_a_neuron_that_is_all_but_silent_is_not_fitted_to_noise() -> None:
    """On another text it says as much as any: the dense weight is still right for it there."""
    drawn = torch.Generator().manual_seed(0)
    acts, down, noise, others = (
        torch.randn(n, 24, generator=drawn).double() for n in (400, 32, 400, 200)
    )
    acts[:, 3] *= 1e-4
    equations = NormalEquations(down)
    equations.add(acts, acts @ down.t() + 2 * noise @ torch.ones(24, 32).double(), held_out=50)
    error = others @ (equations.solve(0) - down).t()
    assert error.norm() < (others @ down.t()).norm()


def test_a_neuron_of_the_held_out_text_alone_does_not_choose_the_ridge() -> None:
    drawn = torch.Generator().manual_seed(0)
    acts, down, noise = (torch.randn(n, 24, generator=drawn).double() for n in (400, 32, 400))
    acts[:-50, 3] *= 1e-4
    better = down + torch.randn(32, 24, generator=drawn).double()
    wanted = acts @ better.t() + noise @ torch.ones(24, 32).double() / 24**0.5
    equations = NormalEquations(down)
    equations.add(acts, wanted, held_out=50)
    fitted = equations.solve(0)
    assert (wanted - acts @ fitted.t()).square().mean() < 4
