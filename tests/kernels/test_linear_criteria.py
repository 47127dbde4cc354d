"""linear_cross_entropy and linear_fisher; what they share with linear_entropy is tested there."""

from typing import Any

import pytest
import torch
from entropy_truth import stored
from paths import every_path
from surprise_truth import surprise_truth
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from watch import Watch

from hfprune_fast.kernels import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_fisher,
)

INF, NAN = float("inf"), float("nan")
FP16_SCALE = 4096  # what an fp16 head's dz carries at least, by the docs


def dyadic(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden and weight whose logits, multiples of 1/16 of size width at most, are exact."""
    generator = torch.Generator().manual_seed(tokens + vocab)
    hidden = torch.randint(-2, 3, (tokens, width), generator=generator) / 2
    return hidden.to(dtype), (torch.randint(-8, 9, (vocab, width), generator=generator) / 8).to(
        dtype
    )


def one_hot(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden and weight for which the logits are hidden, and d_hidden is dloss/dlogits."""
    generator = torch.Generator().manual_seed(vocab)
    return (2 * torch.randn(tokens, vocab, generator=generator)).to(dtype), torch.eye(vocab).to(
        dtype
    )


@every_path
@pytest.mark.parametrize(
    "options",
    [
        {}, {"fp32_logits": True}, {"logits_budget_bytes": 1}, {"grad_scale": 1024.0},
        {"softcap": 5.0, "logit_scale": 2.0, "logits_budget_bytes": 3000},
    ],
)  # fmt: skip
@pytest.mark.parametrize(("tokens", "width", "vocab"), [(1, 3, 1), (7, 12, 127), (9, 8, 1000)])
def test_cross_entropy_equals_float64(
    backend: str, dtype: torch.dtype, options: dict[str, Any], tokens: int, width: int, vocab: int
) -> None:
    hidden, weight = dyadic(tokens, width, vocab, dtype)
    labels = torch.arange(tokens) * 31 % vocab
    labels[1::3] = -100
    row_weight = torch.linspace(0.25, 1, tokens, dtype=torch.float64)
    loss, d_hidden = linear_cross_entropy(
        hidden, weight, labels, row_weight, backend=backend, **options
    )
    transform = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
    wide = weight.double()
    rows = surprise_truth((hidden.double() @ wide.T).to(dtype), labels, **transform)
    share = 2 if dtype == torch.float64 else 1  # the truth is rounded as well
    eps = torch.finfo(loss.dtype).eps
    loss_bound = (row_weight * (rows.value_bound + 2 * eps * rows.value)).sum()
    assert (loss - (row_weight * rows.value).sum()).abs() <= share * loss_bound

    # As in test_linear_entropy.py: dz is rounded to the head's dtype unless the logits are fp32, in
    # fp16 after it is scaled; V products are added in fp32; the sum is rounded.
    fp32_logits, grad_scale = options.get("fp32_logits", False), options.get("grad_scale", 1.0)
    scale = max(grad_scale, FP16_SCALE) if dtype == torch.float16 and not fp32_logits else 1
    kept = torch.promote_types(dtype, torch.float32) if fp32_logits else dtype
    dz, dz_bound = row_weight[:, None] * rows.grad, row_weight[:, None] * rows.grad_bound
    dz_bound += stored(scale * (dz.abs() + dz_bound), kept, backend) / scale
    truth = dz @ wide
    bound = (dz_bound + 2 * eps * vocab**0.5 * dz.abs()) @ wide.abs()
    bound += stored(grad_scale * (truth.abs() + bound), dtype, "torch") / grad_scale
    assert ((d_hidden.double() / grad_scale - truth).abs() <= share * bound).all()


@pytest.mark.parametrize("transform", [{}, {"softcap": 5.0, "logit_scale": 2.0}])
def test_the_reference_is_what_is_computed(transform: dict[str, float]) -> None:
    hidden, weight = dyadic(6, 8, 50, torch.float64)
    labels, row_weight = torch.tensor([3, -100, 49, 0, 7, 7]), torch.rand(6).double()
    got = linear_cross_entropy(hidden, weight, labels, row_weight, **transform)
    want = linear_cross_entropy_reference(hidden, weight, labels, row_weight, **transform)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_path
def test_rows_without_a_label_count_for_nothing(backend: str, dtype: torch.dtype) -> None:
    hidden, weight = dyadic(6, 12, 50, dtype)
    labels = torch.tensor([1, -100, 2, -100, 3, 4])
    row_weight = torch.tensor([0.5, 1, 1, 1, 0, 1])
    clean = linear_cross_entropy(hidden, weight, labels, row_weight, backend=backend)
    hidden[1], hidden[3], hidden[4] = NAN, INF, NAN
    loss, d_hidden = linear_cross_entropy(hidden, weight, labels, row_weight, backend=backend)
    assert torch.equal(loss, clean[0])
    assert torch.equal(d_hidden, clean[1])
    assert (d_hidden[[1, 3, 4]] == 0).all()
    assert (d_hidden[[0, 2, 5]] != 0).any(dim=1).all()


def test_a_masked_label_makes_the_loss_infinite_and_no_gradient_nan(backend: str) -> None:
    hidden, weight = dyadic(3, 12, 50, torch.float32)
    bias = torch.zeros(50)
    bias[7] = -INF
    labels = torch.tensor([7, 1, 2])
    loss, d_hidden = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend)
    assert loss == INF
    assert d_hidden.isfinite().all()


@every_path
def test_samples_do_not_depend_on_chunks_or_on_the_order_of_rows(
    backend: str, dtype: torch.dtype
) -> None:
    hidden, weight = one_hot(12, 127, dtype)
    ids = (torch.arange(12) << 20) + (1 << 40) - (3 << 20)
    options: dict[str, Any] = {"seed": 4, "backend": backend}
    ones = torch.ones(12)
    loss, d_logits = linear_fisher(hidden, weight, ids, ones, **options)
    for budget in (1, 3000):
        some = linear_fisher(hidden, weight, ids, ones, logits_budget_bytes=budget, **options)
        assert torch.equal(some[1].argmin(dim=1), d_logits.argmin(dim=1))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = linear_fisher(hidden[order], weight, ids[order], ones, **options)
    assert torch.equal(mixed[1].argmin(dim=1), d_logits[order].argmin(dim=1))
    # A sampled label gives the result of the same label given.
    y = d_logits.argmin(dim=1)
    given = linear_cross_entropy(hidden, weight, y, ones, backend=backend)
    assert torch.equal(given[0], loss)
    assert torch.equal(given[1], d_logits)
    assert len(y.unique()) > 6


def test_both_backends_draw_the_same(backend: str) -> None:
    hidden, weight = one_hot(30, 300, torch.float32)
    ids = torch.arange(30)
    got, torchs = (linear_fisher(hidden, weight, ids, backend=b)[1] for b in (backend, "torch"))
    # No number of this seed is as near to a step of the distribution as the sums may differ.
    assert torch.equal(got.argmin(dim=1), torchs.argmin(dim=1))


def test_flops(backend: str) -> None:
    hidden, weight = dyadic(20, 12, 333, torch.bfloat16)
    keys = torch.arange(20)
    for function in (linear_cross_entropy, linear_fisher):
        with Watch(hidden, weight) as watch:
            function(hidden, weight, keys, logits_budget_bytes=5000, backend=backend)
        assert watch.flops == 4 * 20 * 12 * 333
        with FlopCounterMode(display=False) as flops:
            function(hidden, weight, keys, backend=backend)
        assert flops.get_total_flops() == 4 * 20 * 12 * 333


@pytest.mark.parametrize(("tokens", "vocab"), [(0, 7), (3, 0)])
def test_empty(backend: str, tokens: int, vocab: int) -> None:
    hidden, weight = torch.zeros(tokens, 4), torch.zeros(vocab, 4)
    labels = torch.full((tokens,), -100)
    loss, d_hidden = linear_cross_entropy(hidden, weight, labels, backend=backend)
    assert loss == 0
    assert (d_hidden == 0).all()
    loss, d_hidden = linear_fisher(hidden, weight, labels, backend=backend)
    assert loss == 0
    assert (d_hidden == 0).all()


KEYS = torch.arange(3)
