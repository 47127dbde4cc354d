"""The pass over a student's and a teacher's rows of logits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import normal, random, sparse_memory
from paths import every_path
from rows_truth import assert_rows, kl_truth, softmax_truth
from torch import Tensor

from hfprune_fast.kernels import softmax_kl_grad_
from hfprune_fast.kernels._kl_rows import kl_rows_and_grad

NAN, INF = float("nan"), float("inf")
PLAIN: dict[str, Any] = {}
TRANSFORMS: list[dict[str, Any]] = [
    PLAIN,
    {"softcap": 30.0},
    {"teacher_softcap": 5.0, "teacher_logit_scale": 1.7},
    {"softcap": 5.0, "logit_scale": 1.7, "teacher_softcap": 8.0, "teacher_logit_scale": 0.5},
]


def value_and_grad(
    logits: Tensor, teacher: Tensor, backend: str, row_scale: Tensor | None = None,
    grad: Tensor | None = None, *, softcap: float | None = None, logit_scale: float = 1.0,
    teacher_softcap: float | None = None, teacher_logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient is written into new memory, which holds NaN here."""
    grad = torch.empty_like(logits) if grad is None else grad
    scale = torch.ones(len(logits)) if row_scale is None else row_scale
    transforms = (softcap, logit_scale), (teacher_softcap, teacher_logit_scale)
    return kl_rows_and_grad(logits, teacher, scale, grad, *transforms, backend), grad


def assert_right(
    logits: Tensor, teacher: Tensor, backend: str, row_scale: Tensor | None = None,
    **transform: Any,
) -> None:  # fmt: skip
    values, grad = value_and_grad(logits, teacher, backend, row_scale, **transform)
    assert_rows(values, grad, kl_truth(logits, teacher, **transform), backend, row_scale)


@every_path
@pytest.mark.parametrize(
    # 8192 logits are one step of the kernel in 16 bits and 4096 in fp32.
    ("shape", "transform"),
    [
        ((1, 1), {}), ((5, 2), TRANSFORMS[3]), ((3, 127), TRANSFORMS[1]), ((1, 8192), {}),
        ((1, 8193), TRANSFORMS[3]), ((2, 20000), TRANSFORMS[2]),
    ],
)  # fmt: skip
def test_equals_float64(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], transform: dict[str, Any]
) -> None:
    scale = torch.linspace(-1, 2, shape[0])
    assert_right(normal(*shape, dtype), random(*shape, dtype=dtype), backend, scale, **transform)


@every_path
@settings(deadline=None, max_examples=6)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(0, 3)),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    teacher_spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    masked=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    transform=st.sampled_from(TRANSFORMS),
    seed=st.integers(0, 2**31),
)
def test_extreme_logits(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int], spread: float,
    teacher_spread: float, masked: float, transform: dict[str, Any], seed: int,
) -> None:  # fmt: skip
    rows, vocab, gap = sizes
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((2, rows, vocab + gap), NAN, dtype=dtype)
    logits, teacher = memory[0, :, :vocab], memory[1, :, :vocab]
    for z, size in ((logits, spread), (teacher, teacher_spread)):
        z.copy_(size * torch.randn(rows, vocab, generator=generator).clamp(-2, 2))
        z[torch.rand(rows, vocab, generator=generator) < masked] = -INF
    row_scale = 2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1
    row_scale[0] *= seed % 2
    # Where p is smaller than the maths can hold it is 0, and then nothing is inf.
    of_teacher = {k.removeprefix("teacher_"): v for k, v in transform.items() if k[:2] == "te"}
    p = softmax_truth(teacher, **of_teacher).p
    is_masked, tiny = logits == -INF, torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
    teacher[is_masked & (p < tiny)] = -INF
    truth = kl_truth(logits, teacher, **transform)
    before = teacher.clone()
    values, _ = value_and_grad(logits, teacher, backend, row_scale, logits, **transform)
    assert_rows(values, logits, truth, backend, row_scale)
    assert (logits[is_masked] == 0).all()
    assert torch.equal(teacher, before)
    assert memory[..., vocab:].isnan().all()  # what lies between the rows was not touched


@pytest.mark.parametrize("transform", [{}, TRANSFORMS[3]])
def test_masked_entries(backend: str, transform: dict[str, Any]) -> None:
    logits, teacher = normal(6, 9000), random(6, 9000)
    logits[0, 1::2] = teacher[0, 1::2] = -INF  # the same entries
    teacher[1, 5:] = -INF  # what the student allows and the teacher not: no term
    logits[2, 3] = -INF  # and the other way round
    logits[3] = -INF
    teacher[4] = -INF
    logits[5] = teacher[5] = -INF
    values, grad = value_and_grad(logits, teacher, backend, **transform)
    assert_rows(values, grad, kl_truth(logits, teacher, **transform), backend)
    assert values[2:4].tolist() == [INF, INF]
    assert values[4:].tolist() == [0, 0]
    assert values[:2].isfinite().all()
    assert grad.isfinite().all()
    assert (grad[logits == -INF] == 0).all()
    assert (grad[3:] == 0).all()


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_nan_shows_unless_the_row_counts_for_nothing(backend: str, of: str) -> None:
    rows = {"student": normal(3, 9000), "teacher": random(3, 9000)}
    rows[of][0, 8500] = rows[of][1, 3] = rows[of][2] = NAN
    scale = torch.tensor([1.0, 0.0, 1.0])
    values, grad = value_and_grad(rows["student"], rows["teacher"], backend, scale)
    assert values.isnan().all()
    assert grad[::2].isnan().any(dim=1).all()
    assert (grad[1] == 0).all()


@every_path
def test_the_same_logits_give_exactly_nothing(backend: str, dtype: torch.dtype) -> None:
    logits = normal(3, 9000, dtype)
    values, grad = value_and_grad(logits, logits.clone(), backend)
    assert (values == 0).all()
    assert (grad == 0).all()


def test_a_small_divergence_keeps_its_digits(backend: str) -> None:
    """The two sums of exp have logarithms near 13, whose fp32 has a unit of half the value."""
    teacher = random(4, 5000, scale=3)
    logits = teacher + random(4, 5000, seed=1, scale=2e-3)
    values, _ = value_and_grad(logits, teacher, backend)
    truth = kl_truth(logits, teacher).value
    assert ((truth > 1e-6) & (truth < 3e-6)).all()
    # The quotient of the two sums of exp is rounded, by u = eps / 2; p and q by a few u, but
    # independently in each entry, so that their sum comes to less.
    eps = torch.finfo(torch.float32).eps
    assert ((values - truth).abs() < eps).all()
    # What rounding these logarithms alone would do.
    z, w = logits.double(), teacher.double()
    of_q, of_p = (each.logsumexp(1).float().double() for each in (z, w))
    rounded = (w.softmax(1) * (w - z)).sum(1) + of_q - of_p
    assert ((rounded - truth).abs() > eps).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_writing_over_the_logits_changes_nothing(backend: str, transform: dict[str, Any]) -> None:
    logits, teacher, scale = normal(3, 9000), random(3, 9000), torch.tensor([1.0, 0.0, -3.0])
    values, grad = value_and_grad(logits, teacher, backend, scale, **transform)
    again = softmax_kl_grad_(logits, teacher, scale, backend=backend, **transform)
    assert torch.equal(logits, grad)
    assert torch.equal(again, values)


def test_dtypes_may_differ(backend: str) -> None:
    logits, teacher = normal(3, 9000), random(3, 9000).bfloat16()
    assert_right(logits, teacher, backend)
    _, low = value_and_grad(logits, teacher, backend, grad=torch.empty(3, 9000).bfloat16())
    _, high = value_and_grad(logits, teacher, backend)
    assert ((low - high).abs() <= 2**-7 * high.abs()).all()  # the interpreter truncates


def test_rows_beyond_2_to_the_31_elements(backend: str, tmp_path: Any) -> None:
    # Row 2 starts 2^31 elements after row 0, and 2^31 before it if the offset wraps.
    memory = sparse_memory(tmp_path)
    logits, teacher = (
        memory[i * 8 :].as_strided((3, 5), (2**30, 1), i * 8 + 2**31 - 16) for i in range(2)
    )
    logits.copy_(normal(3, 5))
    teacher.copy_(random(3, 5))
    expected_values, expected = value_and_grad(logits.clone(), teacher.clone(), backend)
    values, _ = value_and_grad(logits, teacher, backend, grad=logits)
    assert torch.equal(values, expected_values)
    assert torch.equal(logits, expected)
    assert (memory[:32] == 0).all()


def test_many_blocks_of_rows() -> None:
    # The torch path takes half a million logits at a time.
    assert_right(normal(20, 60_000), random(20, 60_000), "torch", torch.linspace(0, 1, 20))
