"""The linear criteria with labels; what they share with linear_entropy is tested there."""

from typing import Any

import pytest
import torch
from kernel_inputs import dyadic, random
from paths import every_path
from rows_truth import (
    assert_head,
    assert_loss_and_grad,
    exact_logits,
    self_distillation_truth,
)
from torch import Tensor

from hfprune_fast.kernels import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_fisher,
    linear_self_distillation,
)

INF, NAN = float("inf"), float("nan")
CAPPED = {"softcap": 5.0, "logit_scale": 2.0}


def one_hot(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden and weight for which the logits are hidden, and d_hidden is dloss/dlogits."""
    return random(tokens, vocab, dtype=dtype, seed=vocab, scale=2), torch.eye(vocab).to(dtype)


@every_path
@pytest.mark.parametrize(
    "options",
    [
        {}, {"fp32_logits": True}, {"logits_budget_bytes": 1}, {"grad_scale": 1024.0},
        {**CAPPED, "logits_budget_bytes": 3000},
    ],
)  # fmt: skip
def test_cross_entropy_equals_float64(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    for tokens, width, vocab in ((1, 3, 1), (5, 12, 127), (4, 8, 1000)):
        hidden, weight, bias = dyadic(tokens, width, vocab, dtype)
        labels = torch.arange(tokens) * 31 % vocab
        labels[1::3] = -100
        row_weight = torch.linspace(0.25, 1, tokens, dtype=torch.float64)
        assert_head(
            linear_cross_entropy, hidden, weight, row_weight, backend,
            labels=labels, bias=bias, **options,
        )  # fmt: skip


@pytest.mark.parametrize("transform", [{}, CAPPED])
def test_the_reference_is_what_is_computed(transform: dict[str, float]) -> None:
    hidden, weight, _ = dyadic(6, 8, 50, torch.float64)
    labels, row_weight = torch.tensor([3, -100, 49, 0, 7, 7]), torch.rand(6).double()
    got = linear_cross_entropy(hidden, weight, labels, row_weight, **transform)
    want = linear_cross_entropy_reference(hidden, weight, labels, row_weight, **transform)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_path
def test_rows_without_a_label_count_for_nothing(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, _ = dyadic(6, 12, 50, dtype)
    labels = torch.tensor([1, -100, 2, -100, 3, 4])
    row_weight = torch.tensor([0.5, 1, 1, 1, 0, 1])
    clean = linear_cross_entropy(hidden, weight, labels, row_weight, backend=backend)
    hidden[1], hidden[3], hidden[4] = NAN, INF, NAN
    loss, d_hidden = linear_cross_entropy(hidden, weight, labels, row_weight, backend=backend)
    assert torch.equal(loss, clean[0])
    assert torch.equal(d_hidden, clean[1])
    assert (d_hidden[[1, 3, 4]] == 0).all()
    assert (d_hidden[[0, 2, 5]] != 0).any(dim=1).all()


@every_path
@pytest.mark.parametrize("options", [{}, {**CAPPED, "fp32_logits": True}])
def test_self_distillation_equals_float64(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    fp32_logits = options.get("fp32_logits", False)
    transform = {name: value for name, value in options.items() if name != "fp32_logits"}
    for tokens, vocab in ((1, 1), (5, 127), (4, 1000)):
        hidden, weight, bias = dyadic(tokens, 12, vocab, dtype)
        labels = torch.arange(tokens) * 31 % vocab
        labels[1::3] = -100
        row_weight = torch.linspace(0.25, 1, tokens, dtype=torch.float64)
        found = linear_self_distillation(
            hidden, weight, labels, row_weight, bias=bias, alpha=0.3, temperature=0.25,
            logits_budget_bytes=3000, backend=backend, **options,
        )  # fmt: skip
        logits = exact_logits(hidden, weight, bias)
        rows = self_distillation_truth(logits, labels, 0.3, 0.25, **transform)
        assert_loss_and_grad(*found, rows, weight, row_weight, backend, fp32_logits, 1.0)


def test_self_distillation_by_default_is_the_papers() -> None:
    hidden, weight, _ = dyadic(4, 8, 50, torch.float64)
    labels = torch.tensor([3, 0, 49, 7])
    loss, d_hidden = linear_self_distillation(hidden, weight, labels)
    h = hidden.clone().requires_grad_()
    z = h @ weight.T
    teacher = (z.detach() / 0.5).softmax(1)
    kl = (teacher * (teacher.log() - z.log_softmax(1))).sum(1).mean()
    plain = 0.6 * torch.nn.functional.cross_entropy(z, labels) + 0.4 * kl
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(plain, h)
    torch.testing.assert_close(d_hidden, grad, rtol=1e-12, atol=1e-14)


def test_a_masked_label_makes_the_loss_infinite_and_no_gradient_nan(backend: str) -> None:
    hidden, weight, bias = dyadic(3, 12, 50, torch.float32)
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
    y = d_logits.argmin(dim=1)
    some = linear_fisher(hidden, weight, ids, ones, logits_budget_bytes=3000, **options)
    assert torch.equal(some[1].argmin(dim=1), y)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = linear_fisher(hidden[order], weight, ids[order], ones, **options)
    assert torch.equal(mixed[1].argmin(dim=1), y[order])
    # A sampled label gives the result of the same label given.
    given = linear_cross_entropy(hidden, weight, y, ones, backend=backend)
    assert torch.equal(given[0], loss)
    assert torch.equal(given[1], d_logits)
    assert len(y.unique()) > 6


def test_both_backends_draw_the_same(backend: str) -> None:
    hidden, weight = one_hot(12, 300, torch.float32)
    ids = torch.arange(12)
    got, torchs = (linear_fisher(hidden, weight, ids, backend=b)[1] for b in (backend, "torch"))
    # No number of this seed is as near to a step of the distribution as the sums may differ.
    assert torch.equal(got.argmin(dim=1), torchs.argmin(dim=1))
