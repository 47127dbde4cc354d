import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfprune_fast.kernels import softmax_entropy_grad_, softmax_entropy_grad_reference

POISON = float("nan")


def truth(logits: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """H and its gradient in float64, from the definition; rows may hold -inf."""
    z = logits.double()
    p = torch.softmax(z, dim=-1).nan_to_num(0.0)  # a row of only -inf has no probabilities
    log_p = torch.where(p > 0, p.log(), 0.0)
    entropy = -(p * log_p).sum(dim=-1)
    return entropy, -p * (log_p + entropy[:, None]) * row_scale.double()[:, None]


def assert_close_to_truth(logits: Tensor, row_scale: Tensor) -> None:
    """Error <= 2 x autograd's in the same dtype + the roundings of one store and of fp32 sums."""
    entropy, grad = truth(logits, row_scale)
    eager_entropy, eager_grad = softmax_entropy_grad_reference(logits, row_scale)
    got_grad = logits.clone()
    got_entropy = softmax_entropy_grad_(got_grad, row_scale)
    eps = torch.finfo(got_entropy.dtype).eps
    # Each z - max and log p carries a few roundings of the largest logit's size; a sum of V terms
    # in any order is off by λ √V u with λ = 4 for all practical purposes (Higham and Mary 2019),
    # and there are two: Σ exp, of relative size 1, and H.
    largest = 1 + logits.double().masked_fill(logits == -torch.inf, 0).abs().amax(dim=1)
    floor = eps * (8 * largest + 2 * logits.shape[1] ** 0.5 * (1 + entropy))
    eager_error = (eager_entropy.double() - entropy).abs().nan_to_num(0.0)
    assert ((got_entropy.double() - entropy).abs() <= 2 * eager_error + floor).all()
    stored = torch.finfo(logits.dtype).eps
    scale = row_scale.double().abs()[:, None]
    tiny = torch.finfo(logits.dtype).smallest_normal  # below it a store keeps no relative precision
    eager_error = (eager_grad.double() - grad).abs().nan_to_num(0.0)
    allowed = 2 * eager_error + stored * grad.abs() + scale * floor[:, None] + tiny
    assert ((got_grad.double() - grad).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 2), (3, 127), (7, 4099), (2, 32000)])
def test_matches_float64(dtype: torch.dtype, rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    assert_close_to_truth(logits, torch.rand(rows, generator=generator))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    masked=st.floats(0, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_extreme_logits(
    rows: int, vocab: int, spread: float, masked: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocab, generator=generator).clamp(-2, 2)).to(dtype)
    logits[torch.rand(rows, vocab, generator=generator) < masked] = -torch.inf
    assert_close_to_truth(logits, torch.rand(rows, generator=generator))


def test_known_rows() -> None:
    logits = torch.full((4, 8), -torch.inf)
    logits[0] = 5.0  # uniform
    logits[1, 3] = 2.0  # all mass on one
    logits[2, :2] = 1.0  # half and half, the rest masked; row 3 is only -inf
    entropy = softmax_entropy_grad_(logits, torch.ones(4))
    assert entropy.tolist() == pytest.approx([torch.log(torch.tensor(8.0)).item(), 0, 0.6931472, 0])
    assert logits.abs().max() < 1e-6  # each is a stationary point of H
    assert (logits[2, 2:] == 0).all()
    assert (logits[3] == 0).all()


def test_many_blocks_and_strided_rows() -> None:
    wide = torch.full((40, 2 * 60_000), POISON)
    wide[:, ::2] = torch.randn(40, 60_000, generator=torch.Generator().manual_seed(0))
    logits = wide[:, ::2]
    expected = logits.clone()
    row_scale = torch.linspace(0, 1, 40)
    expected_entropy = softmax_entropy_grad_(expected, row_scale)
    entropy, grad = truth(logits, row_scale)
    got = softmax_entropy_grad_(logits, row_scale)
    assert torch.equal(got, expected_entropy)
    assert torch.equal(logits, expected)
    assert wide[:, 1::2].isnan().all()  # what lies between was not touched
    assert (got - entropy).abs().max() < 1e-4
    assert (logits - grad).abs().max() < 1e-8


def test_nan_is_not_hidden() -> None:
    logits = torch.tensor([[0.0, POISON], [0.0, torch.inf]])
    assert softmax_entropy_grad_(logits, torch.ones(2)).isnan().all()


def test_empty() -> None:
    assert softmax_entropy_grad_(torch.empty(0, 5), torch.empty(0)).shape == (0,)


@pytest.mark.parametrize(
    ("logits", "row_scale"),
    [
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(2)),
    ],
)
def test_bad_arguments(logits: Tensor, row_scale: Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        softmax_entropy_grad_(logits, row_scale)
