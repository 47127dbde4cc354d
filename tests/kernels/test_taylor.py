import math

import pytest
import torch

from hfprune_fast.kernels import taylor_statistics, taylor_statistics_reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 130, 5), (2, 257, 64), (4, 128, 7)])
def test_matches_exact_sums(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    grad = (1e-9 * torch.randn(shape, generator=generator)).to(dtype)
    act = torch.randn(shape, generator=generator).to(dtype)
    got = taylor_statistics(grad, act)
    for name, tensor in zip(got._fields, got, strict=True):
        assert tensor.dtype == torch.float64, name
    for j in {0, shape[2] - 1}:
        a, g = act[..., j].double(), grad[..., j].double()
        x = [[float(v) for v in row] for row in g * a]
        flat = [v for row in x for v in row]
        expected = (
            math.fsum(abs(v) for v in flat),
            math.fsum(v * v for v in flat),
            math.fsum(math.fsum(row) ** 2 for row in x),
            math.fsum(float(v) ** 2 for v in a.flatten()),
        )
        # fp64 sums of n terms of one sign: relative error <= n eps. `mask` squares a sum of terms
        # of both signs, so its error is relative to (Σ|x|)².
        n_eps = 2 * len(flat) * torch.finfo(torch.float64).eps
        bounds = [n_eps * expected[0], n_eps * expected[1], 2 * n_eps * expected[0] ** 2]
        for name, bound, want in zip(
            got._fields, [*bounds, n_eps * expected[3]], expected, strict=True
        ):
            assert abs(float(getattr(got, name)[j]) - want) <= bound, name


def test_reference_agrees() -> None:
    grad, act = torch.randn(2, 3, 200, 9).unbind()
    for got, want in zip(
        taylor_statistics(grad, act), taylor_statistics_reference(grad, act), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_inputs_are_left_alone_and_sequences_add_up() -> None:
    grad, act = torch.randn(2, 4, 150, 6, dtype=torch.float64).unbind()
    copies = grad.clone(), act.clone()
    whole = taylor_statistics(grad, act)
    assert torch.equal(grad, copies[0])
    assert torch.equal(act, copies[1])
    single = [taylor_statistics(grad[b : b + 1], act[b : b + 1]) for b in range(4)]
    for name in whole._fields:
        summed = sum(getattr(s, name) for s in single)
        torch.testing.assert_close(getattr(whole, name), summed, rtol=1e-13, atol=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(B, S, F\)"):
        taylor_statistics(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"\(B, S, F\)"):
        taylor_statistics(torch.zeros(3, 4), torch.zeros(3, 4))
