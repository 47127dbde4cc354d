"""linear_kl; the pass over the rows is held by test_kl_rows.py, autograd by test_loss.py."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import dyadic, random
from paths import every_path, slow_in_triton
from rows_truth import assert_loss_and_grad, exact_logits, kl_truth
from tolerances import assert_no_worse, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from truth import kl_nats
from watch import Watch

from hfprune_fast.kernels import linear_kl, linear_kl_reference

INF, NAN = float("inf"), float("nan")
TRANSFORMS: list[dict[str, float]] = [
    {},
    {"temperature": 2.5},
    {"softcap": 8.0, "teacher_logit_scale": 0.25},
    {
        "softcap": 5.0, "logit_scale": 2.0, "teacher_softcap": 9.0, "teacher_logit_scale": 1.5,
        "temperature": 0.5,
    },
]  # fmt: skip


def heads(tokens: int, width: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Any:
    """hidden, weight and bias of a student, and of a teacher of another width."""
    student = dyadic(tokens, width, vocab, dtype, seed)
    return student, dyadic(tokens, width // 2 + 1, vocab, dtype, seed + 1)


def kl(student: Any, teacher: Any, row_weight: Tensor | None = None, **options: Any) -> Any:
    (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias) = student, teacher
    return linear_kl(
        hidden, weight, teacher_hidden, teacher_weight, row_weight,
        bias=bias, teacher_bias=teacher_bias, **options,
    )  # fmt: skip


def assert_right(
    student: Any, teacher: Any, row_weight: Tensor, backend: str, *, fp32_logits: bool = False,
    grad_scale: float = 1.0, logits_budget_bytes: int | None = None, **transform: float,
) -> None:  # fmt: skip
    """For dyadic inputs: the errors of loss and d_hidden stay within the bounds on rounding."""
    found = kl(
        student, teacher, row_weight, fp32_logits=fp32_logits, grad_scale=grad_scale,
        logits_budget_bytes=logits_budget_bytes, backend=backend, **transform,
    )  # fmt: skip
    rows = kl_truth(exact_logits(*student), exact_logits(*teacher), **transform)
    assert_loss_and_grad(*found, rows, student[1], row_weight, backend, fp32_logits, grad_scale)


@every_path
@settings(deadline=None, max_examples=6)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 80)),
    has_bias=st.booleans(),
    transform=st.sampled_from(TRANSFORMS),
    fp32_logits=st.booleans(),
    logits_budget_bytes=st.sampled_from([None, 1, 3000]),
    grad_scale=st.sampled_from([1.0, 1024.0]),
    padding=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_float64(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int], has_bias: bool,
    transform: dict[str, float], padding: bool, seed: int, **options: Any,
) -> None:  # fmt: skip
    student, teacher = heads(*sizes, dtype, seed)
    if not has_bias:
        student, teacher = (*student[:2], None), (*teacher[:2], None)
    row_weight = torch.rand(sizes[0], generator=torch.Generator().manual_seed(seed)).double()
    row_weight[: sizes[0] // 2] *= not padding
    assert_right(student, teacher, row_weight, backend, **transform, **options)


@every_path
@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 40), (12, 1000)])
def test_no_worse_than_autograd(
    backend: str, dtype: torch.dtype, fp32_logits: bool, tokens: int, vocab: int
) -> None:
    # With inputs of full precision, so that the logits are rounded too.
    student = random(tokens, 32, dtype=dtype), random(vocab, 32, dtype=dtype, seed=1, scale=0.25)
    teacher = random(tokens, 8, dtype=dtype), random(vocab, 8, dtype=dtype, seed=2, scale=0.5)
    row_weight = torch.rand(tokens, dtype=torch.float64)
    h = student[0].double().requires_grad_()
    dense, pruned = teacher[0].double() @ teacher[1].double().T, h @ student[1].double().T
    true_loss = (kl_nats(dense, pruned) * row_weight).sum()
    (true_grad,) = torch.autograd.grad(true_loss, h)
    eager_loss, eager_grad = linear_kl_reference(*student, *teacher, row_weight.to(dtype))
    loss, grad = linear_kl(
        *student, *teacher, row_weight, fp32_logits=fp32_logits, backend=backend
    )  # fmt: skip
    # dz and d_hidden are rounded once each. In float64 eager is the truth itself, and a sum of V
    # terms in another order moves by V eps at most.
    eps = torch.finfo(dtype).eps
    floor = (vocab if dtype == torch.float64 else 4) * eps
    assert_no_worse(loss[None], eager_loss[None], true_loss.detach()[None], floor=floor)
    assert_no_worse(grad.flatten(), eager_grad.flatten(), true_grad.flatten(), floor=floor)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_reference_is_what_is_computed(transform: dict[str, float]) -> None:
    student, teacher = heads(6, 8, 50, torch.float64)
    row_weight = torch.rand(6).double()
    got = kl(student, teacher, row_weight, **transform)
    biases = {"bias": student[2], "teacher_bias": teacher[2]}
    want = linear_kl_reference(*student[:2], *teacher[:2], row_weight, **biases, **transform)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_path
def test_padding_counts_for_nothing(backend: str, dtype: torch.dtype) -> None:
    student, teacher = heads(9, 12, 50, dtype)
    row_weight = torch.tensor([0.25, 0, 0, 0.5, 0, 1, 1, 0, 0])
    padding = row_weight == 0
    clean_loss, clean = kl(student, teacher, row_weight, backend=backend)
    values = torch.tensor([NAN, INF, -INF, 6e4, NAN], dtype=dtype)[:, None]
    student[0][padding], teacher[0][padding] = values, values.flip(0)
    loss, d_hidden = kl(student, teacher, row_weight, backend=backend)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(d_hidden, clean)
    assert (d_hidden[padding] == 0).all()
    assert (d_hidden[~padding] != 0).any(dim=1).all()


def test_by_default_the_mean(backend: str) -> None:
    student, teacher = heads(8, 12, 90, torch.float32)
    found = kl(student, teacher, backend=backend)
    expected = kl(student, teacher, torch.full((8,), 1 / 8), backend=backend)
    assert all(map(torch.equal, found, expected))


def test_entries_that_either_masks(backend: str) -> None:
    student, teacher = heads(5, 12, 50, torch.float32)
    teacher[2][7:9] = -INF
    right = kl(student, teacher, backend=backend)
    assert all(tensor.isfinite().all() for tensor in right)
    both = student[2].clone()
    both[7:9] = -INF
    masked = kl((*student[:2], both), teacher, backend=backend)
    assert masked[0] < right[0]  # the student spends nothing on what the teacher masks
    kept = [i for i in range(50) if i not in (7, 8)]
    without = ((hidden, weight[kept], bias[kept]) for hidden, weight, bias in (student, teacher))
    for ours, theirs in zip(masked, kl(*without, backend=backend), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    both[9] = -INF  # which the teacher allows
    loss, d_hidden = kl((*student[:2], both), teacher, backend=backend)
    assert loss == INF
    assert d_hidden.isfinite().all()


def test_the_teacher_itself_has_no_divergence(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = random(5, 12, dtype=dtype), random(90, 12, dtype=dtype, seed=1)
        loss, d_hidden = linear_kl(hidden, weight, hidden, weight, softcap=3.0, teacher_softcap=3.0)
        assert loss == 0
        assert (d_hidden == 0).all()


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_a_teacher_of_another_dtype(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], fp32_logits: bool
) -> None:
    student, teacher = heads(5, 12, 60, dtypes[0])
    teacher = tuple(tensor.to(dtypes[1]) for tensor in teacher)
    options: dict[str, Any] = {"fp32_logits": fp32_logits, "logits_budget_bytes": 2000}
    assert_right(student, teacher, torch.rand(5).double(), backend, **options)


@slow_in_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(backend: str, dtype: torch.dtype) -> None:
    student, teacher = heads(6, 12, 50, dtype)

    def apart(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, dim=0)[::2]

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t()

    expected = kl(student, teacher, backend=backend)
    strided = [
        (apart(transposed(hidden)), transposed(weight), apart(bias))
        for hidden, weight, bias in (student, teacher)
    ]
    found = kl(*strided, torch.full((12,), 1 / 6)[::2], backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        # Products of other strides add in another order; the logits are exact.
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


each_head = pytest.mark.parametrize(
    ("dtype", "fp32_logits"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
# tokens, width, vocab, whether there is a bias, and the budget, which chunks just fill.
SIZES = {
    "torch": [(150, 64, 16001, True, 4 << 20)],
    "cpp": [(150, 64, 16001, True, 4 << 20)],
    "triton": [(8, 64, 3001, True, 45_000)],
}


@each_head
def test_both_logits_share_the_budget(backend: str, dtype: torch.dtype, fp32_logits: bool) -> None:
    for tokens, width, vocab, has_bias, budget in SIZES[backend]:
        student, teacher = heads(tokens, width, vocab, dtype)
        if not has_bias:
            student, teacher = (*student[:2], None), (*teacher[:2], None)
        row_weight = torch.ones(tokens)
        given = (tensor for tensor in (*student, *teacher, row_weight) if tensor is not None)
        with Watch(*given) as watch:
            kl(
                student, teacher, row_weight, fp32_logits=fp32_logits,
                logits_budget_bytes=budget, backend=backend,
            )  # fmt: skip
        rows = 8 * 5 * tokens  # five numbers of 8 bytes a row at most
        # The torch path's pass over the logits holds six fp32 blocks of half a million elements,
        # or of one row, and a mask.
        block = 2 << 20 if backend == "torch" else 0
        hidden = student[0]
        assert budget // 2 < watch.peak <= budget + hidden.nbytes + rows + 7 * block
        assert watch.largest <= max(budget, block) < tokens * vocab * hidden.element_size()


@each_head
def test_flops_and_no_wait_for_the_device(
    backend: str, dtype: torch.dtype, fp32_logits: bool
) -> None:
    student, teacher = heads(4, 12, 333, dtype)
    options = {"fp32_logits": fp32_logits, "logits_budget_bytes": 5000, "backend": backend}
    with Watch() as watch:
        kl(student, teacher, **options)
    with FlopCounterMode(display=False) as flops:
        kl(student, teacher, **options)
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
    assert not {name.removeprefix("aten::").split(".")[0] for name in watch.names} & waits
    assert watch.flops == flops.get_total_flops() == (4 * 12 + 2 * 7) * 4 * 333


@slow_in_triton
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_fp16_gradients_survive_a_large_vocabulary(backend: str, fp32_logits: bool) -> None:
    student, teacher = heads(3, 12, 32000, torch.float16)
    row_weight = torch.full((3,), 1 / 1024, dtype=torch.float64)
    assert_right(student, teacher, row_weight, backend, fp32_logits=fp32_logits)
    _, d_hidden = kl(student, teacher, row_weight, fp32_logits=fp32_logits, backend=backend)
    dz = kl_truth(exact_logits(*student), exact_logits(*teacher)).grad / 1024
    truth = dz @ student[1].double()
    # u = eps / 2 from the rounding of d_hidden, and less from those of dz, many and small.
    eps = torch.finfo(torch.float16).eps
    assert relative_error(d_hidden, truth).max() < eps
    unscaled = dz.half().double() @ student[1].double()
    assert relative_error(unscaled, truth).min() > 10 * eps


def test_grad_scale_is_exact(backend: str) -> None:
    for dtype in (torch.float32, torch.float16):
        student, teacher = heads(4, 12, 40, dtype)
        expected_loss, expected = kl(student, teacher, backend=backend)
        loss, d_hidden = kl(student, teacher, grad_scale=8192.0, backend=backend)
        assert torch.equal(loss, expected_loss)
        assert torch.equal(d_hidden.double() / 8192, expected.double())
