"""Criteria beside the entropy in the row pass; that is test_entropy.py's."""

from typing import Any

import pytest
import torch
from kernel_inputs import normal
from paths import every_path
from rows_truth import assert_drawn, assert_rows, in_lanes, rows_truth, self_distillation_truth
from torch import Tensor

from hfprune_fast.kernels._criterion import Criterion
from hfprune_fast.kernels._philox import uniform
from hfprune_fast.kernels._rows import rows_loss_and_grad

INF, NAN = float("inf"), float("nan")
CAPPED: dict[str, float] = {"softcap": 5.0, "logit_scale": 1.7}
each_case = pytest.mark.parametrize(
    # 8192 logits are one step of the kernel.
    ("vocab", "transform"), [(1, {}), (127, CAPPED), (8192, CAPPED), (20_000, {})],
)  # fmt: skip


def value_and_grad(
    logits: Tensor, criterion: Criterion, backend: str, row_scale: Tensor | None = None,
    softcap: float | None = None, logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient is written into new memory, which holds NaN here."""
    grad = torch.empty_like(logits)
    scale = torch.ones(len(logits)) if row_scale is None else row_scale
    options: dict[str, Any] = {
        "softcap": softcap, "logit_scale": logit_scale, "backend": backend,
    }  # fmt: skip
    values = rows_loss_and_grad(logits, scale, grad, criterion, **options)
    return values, grad


@every_path
@each_case
def test_cross_entropy_equals_float64(
    backend: str, dtype: torch.dtype, vocab: int, transform: dict[str, float]
) -> None:
    logits = normal(4, vocab, dtype)
    labels = torch.tensor([0, vocab - 1, -100, vocab // 2])
    criterion = Criterion("cross_entropy", labels)
    values, grad = value_and_grad(logits, criterion, backend, **transform)
    assert_rows(values, grad, rows_truth(logits, labels, **transform), backend)
    assert values[2] == 0
    assert (grad[2] == 0).all()


def distilled(labels: Tensor, alpha: float = 0.4, temperature: float = 0.5) -> Criterion:
    return Criterion("self_distillation", labels, alpha=alpha, temperature=temperature)


@every_path
@each_case
@pytest.mark.parametrize(("alpha", "temperature"), [(0.4, 0.5), (0.9, 0.2), (0.5, 3.0)])
def test_self_distillation_equals_float64(
    backend: str, dtype: torch.dtype, vocab: int, transform: dict[str, float],
    alpha: float, temperature: float,
) -> None:  # fmt: skip
    logits = normal(4, vocab, dtype)
    labels = torch.tensor([0, vocab - 1, -100, vocab // 2])
    values, grad = value_and_grad(
        logits, distilled(labels, alpha, temperature), backend, **transform
    )
    truth = self_distillation_truth(logits, labels, alpha, temperature, **transform)
    assert_rows(values, grad, truth, backend)
    assert values[2] == 0
    assert (grad[2] == 0).all()


def test_a_flat_teacher_weighs_logits_far_below_the_maximum(backend: str) -> None:
    # Ascending, so that the maximum of every lane rises by hundreds at each step.
    logits = torch.linspace(-3000, 0, 20_000).repeat(2, 1)
    labels = torch.tensor([19_999, 7])
    values, grad = value_and_grad(logits, distilled(labels, 0.5, 1000.0), backend)
    truth = self_distillation_truth(logits, labels, 0.5, 1000.0)
    assert_rows(values, grad, truth, backend)


@pytest.mark.parametrize("name", ["entropy", "cross_entropy", "fisher", "self_distillation"])
def test_the_lowest_number_masks_as_minus_infinity(backend: str, name: str) -> None:
    """Some mask by it, also every logit of a lane: 8 in 4096."""
    masked, lowest = normal(2, 9000), torch.finfo(torch.float32).min
    masked[:, torch.arange(9000) // 8 % 512 > 100] = -INF
    keys = None if name == "entropy" else torch.tensor([5, 8200])
    criterion = Criterion(name, keys, alpha=0.4, temperature=0.5)
    expected = value_and_grad(masked, criterion, backend)
    got = value_and_grad(masked.masked_fill(masked == -INF, lowest), criterion, backend)
    assert got[0].isfinite().all()
    assert all(map(torch.equal, got, expected))


def test_self_distillation_is_cross_entropy_less_a_sharper_softmax(backend: str) -> None:
    logits, labels = normal(3, 9000), torch.tensor([5, 8999, 0])
    plain = value_and_grad(logits, Criterion("cross_entropy", labels), backend)
    none = value_and_grad(logits, distilled(labels, alpha=0.0), backend)
    for ours, theirs in zip(none, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    # At temperature 1 the teacher is the model: cross entropy remains.
    values, grad = value_and_grad(logits, distilled(labels, 0.25, 1.0), backend)
    torch.testing.assert_close(values, 0.75 * plain[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, 0.75 * plain[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cross_entropy", "fisher", "self_distillation"])
def test_writing_over_the_logits_changes_nothing(backend: str, name: str) -> None:
    logits, criterion = normal(3, 9000), Criterion(name, torch.tensor([5, 8999, 0]))
    values, grad = value_and_grad(logits, criterion, backend)
    again = rows_loss_and_grad(
        logits, torch.ones(3), logits, criterion, softcap=None, logit_scale=1.0, backend=backend
    )
    assert torch.equal(logits, grad)
    assert torch.equal(again, values)


@every_path
@pytest.mark.parametrize("transform", [{}, CAPPED])
def test_masked_entries_and_masked_labels(
    backend: str, dtype: torch.dtype, transform: dict[str, float]
) -> None:
    logits = normal(4, 500, dtype)
    logits[:, 1::2] = -INF
    logits[2] = -INF
    labels = torch.tensor([4, 5, 6, -100])
    values, grad = value_and_grad(logits, Criterion("cross_entropy", labels), backend, **transform)
    assert_rows(values, grad, rows_truth(logits, labels, **transform), backend)
    mixed = value_and_grad(logits, distilled(labels), backend, **transform)
    assert_rows(*mixed, self_distillation_truth(logits, labels, 0.4, 0.5, **transform), backend)
    for value, dz in ((values, grad), mixed):
        assert value[1:3].tolist() == [INF, INF]
        assert (dz[logits == -INF] == 0).all()


@pytest.mark.parametrize("name", ["cross_entropy", "fisher", "self_distillation"])
@pytest.mark.parametrize("transform", [{}, CAPPED])
def test_nan_shows_unless_the_row_counts_for_nothing(
    backend: str, name: str, transform: dict[str, float]
) -> None:
    logits = normal(4, 9000)
    logits[0, 8500] = logits[1] = logits[2, 3] = NAN
    keys = torch.tensor([1, 2, 3, 3 if name == "fisher" else -100])
    scale = torch.tensor([1.0, 1.0, 0.0, 1.0])
    values, grad = value_and_grad(logits, Criterion(name, keys), backend, scale, **transform)
    assert values[:2].isnan().all()
    assert grad[:2].isnan().any(dim=1).all()
    assert (grad[2] == 0).all()
    assert grad[3].isfinite().all()


def test_a_label_outside_the_vocabulary_is_nan(backend: str) -> None:
    labels = torch.tensor([3, -1, -99, -101, 9, 1 << 40])
    for criterion in (Criterion("cross_entropy", labels), distilled(labels)):
        values, grad = value_and_grad(normal(6, 9), criterion, backend)
        assert values.isnan().tolist() == [False] + 5 * [True]
        assert grad.isnan().all(dim=1).tolist() == [False] + 5 * [True]


@every_path
@each_case
def test_a_sample_is_where_the_sum_crosses(
    backend: str, dtype: torch.dtype, vocab: int, transform: dict[str, float]
) -> None:
    logits = normal(4, vocab, dtype)
    logits[:2, 2::3] = -INF
    ids, seed = torch.arange(4) + (1 << 40) - 2, 11
    values, grad = value_and_grad(logits, Criterion("fisher", ids, seed), backend, **transform)
    y = grad.argmin(dim=1)  # of p - [i = y], the only one below 0
    truth = rows_truth(logits, y, **transform)
    assert_rows(values, grad, truth, backend)
    assert_drawn(
        y, logits, uniform(ids, seed, torch.promote_types(dtype, torch.float32)), **transform
    )


def test_uniform_numbers_near_0_and_1_draw_no_masked_entry(backend: str) -> None:
    # The nearest of two million to 1, and to 0.
    ids = torch.tensor([880_909, 888_222, 1_767_245, 334_928])
    u = uniform(ids, 0, torch.float32)
    assert (u[:2] > 1 - 1e-6).all()
    assert (u[2:] < 2e-6).all()
    logits = torch.zeros(4, 30_000)
    logits[:, :50] = logits[:, 20_000:] = -INF
    logits[:, 20_479] = -100.0  # exp is 0 in fp32; the last of its lane, the last one
    values, grad = value_and_grad(logits, Criterion("fisher", ids), backend)
    y = grad.argmin(dim=1)
    order = in_lanes(30_000)
    drawable = order[logits[0, order] == 0]
    assert torch.isin(y[:2], drawable[-100:]).all()
    assert torch.isin(y[2:], drawable[:100]).all()
    assert values.isfinite().all()


def test_nothing_to_draw_counts_nothing(backend: str) -> None:
    logits = torch.full((2, 9000), -INF)
    values, grad = value_and_grad(logits, Criterion("fisher", torch.arange(2)), backend)
    assert (values == 0).all()
    assert (grad == 0).all()


# The interpreter takes long, and draws what torch does by test_linear_criteria.py.
def test_samples_have_the_distribution_and_the_fisher_information() -> None:
    rows = 40_000
    logits = torch.tensor([0.3, -1.0, 1.2, -INF, 0.0, -2.0])
    p = torch.softmax(logits.double(), dim=0)
    ids = (torch.arange(rows) % 1000) + (torch.arange(rows) // 1000 << 20)
    _, grad = value_and_grad(logits.repeat(rows, 1), Criterion("fisher", ids, 5), "torch")
    counts = grad.argmin(dim=1).bincount(minlength=6).double()
    chi_square = ((counts - rows * p) ** 2 / (rows * p))[p > 0].sum()
    # Above 33.4 with probability (1 + x/2) exp(-x/2) = 10^-6, of four degrees of freedom.
    assert chi_square < 33.4
    assert counts[3] == 0
    # Exact expectation over y of each product g_i g_j, and its standard error.
    g = torch.eye(6, dtype=torch.float64).neg() + p  # of y, row by row
    products = g[:, :, None] * g[:, None, :]
    mean = (p[:, None, None] * products).sum(dim=0)
    assert torch.allclose(mean, torch.diag(p) - p[:, None] * p)
    variance = (p[:, None, None] * products**2).sum(dim=0) - mean**2
    found = (grad.double().T @ grad.double()) / rows
    allowed = 5 * (variance.clamp(min=0) / rows).sqrt() + 8 * torch.finfo(torch.float32).eps
    assert ((found - mean).abs() <= allowed).all()
    # So many rows tell the Fisher information from its diagonal.
    assert ((found - torch.diag(p)).abs() > allowed).any()
