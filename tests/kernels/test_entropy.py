from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import normal, sparse_memory
from paths import every_path, slow_in_triton
from rows_truth import assert_rows, rows_truth
from torch import Tensor

from hfprune_fast.kernels import (
    softmax_entropy,
    softmax_entropy_grad_,
    softmax_entropy_grad_reference,
)

NAN, INF = float("nan"), float("inf")
TRANSFORMS: list[dict[str, Any]] = [
    {},
    {"softcap": 30.0},
    {"logit_scale": 0.25},
    {"softcap": 5.0, "logit_scale": 1.7},
]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS)


def assert_right(logits: Tensor, row_scale: Tensor, backend: str, **transform: Any) -> None:
    """Overwrites logits."""
    truth = rows_truth(logits, **transform)
    entropy = softmax_entropy_grad_(logits, row_scale, backend=backend, **transform)
    assert_rows(entropy, logits, truth, backend, row_scale)


@every_path
@pytest.mark.parametrize(
    # 8192 logits are one step of the kernel.
    ("shape", "transform"),
    [
        ((1, 1), {}), ((5, 2), TRANSFORMS[3]), ((3, 127), TRANSFORMS[1]), ((1, 8192), {}),
        ((1, 8193), TRANSFORMS[3]), ((2, 20000), TRANSFORMS[2]),
    ],
)  # fmt: skip
def test_equals_float64(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], transform: dict[str, Any]
) -> None:
    assert_right(normal(*shape, dtype), torch.linspace(-1, 2, shape[0]), backend, **transform)


@each_transform
def test_the_reference_is_what_is_computed(transform: dict[str, Any]) -> None:
    logits, scale = normal(3, 50, torch.float64), torch.tensor([0.5, 1, -2])
    value, grad = softmax_entropy_grad_reference(logits, scale, **transform)
    assert_rows(value, grad, rows_truth(logits, **transform), "torch", scale)


@pytest.mark.parametrize("where", ["first", "last", "rising", "falling"])
def test_maximum_anywhere_among_steps(backend: str, where: str) -> None:
    logits = normal(1, 3 * 8192 + 5)
    ramp = torch.linspace(0, 30, logits.shape[1])
    if where in ("rising", "falling"):
        logits += ramp if where == "rising" else -ramp
    else:
        logits[0, 0 if where == "first" else -1] = 17.0
    assert_right(logits, torch.ones(1), backend)


@every_path
@settings(deadline=None, max_examples=6)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(0, 3)),
    kind=st.sampled_from(["normal", "constant", "one-hot"]),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    masked=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    transform=st.sampled_from(TRANSFORMS),
    seed=st.integers(0, 2**31),
)
def test_extreme_logits(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int], kind: str, spread: float,
    masked: float, transform: dict[str, Any], seed: int,
) -> None:  # fmt: skip
    rows, vocab, gap = sizes
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((rows, vocab + gap), NAN, dtype=dtype)
    logits = memory[:, :vocab]
    if kind == "normal":
        logits.copy_(spread * torch.randn(rows, vocab, generator=generator).clamp(-2, 2))
    else:
        logits.fill_(spread if kind == "constant" else -spread)
    if kind == "one-hot":
        logits[:, vocab // 2] = spread
    is_masked = torch.rand(rows, vocab, generator=generator) < masked
    logits[is_masked] = -INF
    row_scale = 2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1
    row_scale[0] *= seed % 2
    assert_right(logits, row_scale, backend, **transform)
    assert (logits[is_masked] == 0).all()
    assert memory[:, vocab:].isnan().all()  # what lies between the rows was not touched


def test_known_rows(backend: str) -> None:
    logits = torch.full((4, 8), -INF)
    logits[0] = 5.0  # uniform
    logits[1, 3] = 2.0  # all mass on one
    logits[2, :2] = 1.0  # half and half, the rest masked; row 3 is only -inf
    entropy = softmax_entropy_grad_(logits, torch.ones(4), backend=backend)
    assert entropy.tolist() == pytest.approx([2.0794415, 0, 0.6931472, 0])
    assert logits.abs().max() < 1e-6  # each is a stationary point of H
    assert entropy[3] == 0


@pytest.mark.parametrize("vocab", [2, 9000])
def test_nan_and_inf_are_not_hidden(backend: str, vocab: int) -> None:
    logits = torch.zeros(4, vocab)
    logits[0, 1] = logits[1] = NAN
    logits[2, 1] = logits[3] = INF
    assert softmax_entropy(logits, backend=backend).isnan().all()
    softmax_entropy_grad_(logits, torch.ones(4), backend=backend)
    assert logits.isnan().any(dim=1).all()


@every_path
def test_row_scale_zero_makes_exact_zeros(backend: str, dtype: torch.dtype) -> None:
    logits = normal(4, 9000, dtype)
    logits[1], logits[2, 5], logits[3] = NAN, INF, 6e4
    softmax_entropy_grad_(logits, torch.tensor([1.0, 0, 0, 0]), softcap=5.0, backend=backend)
    assert (logits[1:] == 0).all()
    assert (logits[0] != 0).any()


@every_path
@pytest.mark.parametrize("transform", TRANSFORMS[::3])
# One factor for all rows, of stride 0, as .sum() hands back; every third of some numbers.
@pytest.mark.parametrize("row_scale", [torch.ones(1).expand(3), torch.arange(9.0)[1::3] - 3])
def test_forward_and_backward_equal_the_pass_in_place(
    backend: str, dtype: torch.dtype, transform: dict[str, Any], row_scale: Tensor
) -> None:
    logits = normal(3, 100, dtype)[:, :77].requires_grad_()  # rows with a gap
    entropy = softmax_entropy(logits, backend=backend, **transform)
    (grad,) = torch.autograd.grad(entropy, logits, row_scale.to(entropy.dtype))
    in_place = logits.detach().clone()
    again = softmax_entropy_grad_(in_place, row_scale, backend=backend, **transform)
    assert torch.equal(again, entropy)
    assert torch.equal(in_place, grad)
    assert grad.dtype == dtype


@each_transform
def test_gradient_equals_finite_differences(transform: dict[str, Any]) -> None:
    logits = normal(3, 7, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: softmax_entropy(z, **transform), logits)


def test_second_derivative_is_refused(backend: str) -> None:
    logits = normal(2, 5).requires_grad_()
    entropy = softmax_entropy(logits, backend=backend).sum()
    (grad,) = torch.autograd.grad(entropy, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_many_blocks_of_rows() -> None:
    logits = normal(20, 60_000)  # the torch path takes half a million logits at a time
    assert_right(logits, torch.linspace(0, 1, 20), "torch")


def test_rows_beyond_2_to_the_31_elements(backend: str, tmp_path: Any) -> None:
    # Row 2 starts 2^31 elements after row 0, and 2^31 before it if the offset wraps.
    memory = sparse_memory(tmp_path)
    logits = memory.as_strided((3, 5), (2**30, 1), 2**31)
    logits.copy_(normal(3, 5))
    expected = logits.clone()
    entropy = softmax_entropy_grad_(logits, torch.ones(3), backend=backend)
    expected_entropy = softmax_entropy_grad_(expected, torch.ones(3), backend=backend)
    assert torch.equal(entropy, expected_entropy)
    assert torch.equal(logits, expected)
    assert (memory[:5] == 0).all()


@slow_in_triton
def test_compiles_whole_with_its_gradient(backend: str) -> None:
    def run(logits: Tensor, row_scale: Tensor) -> Tensor:
        return softmax_entropy(logits, softcap=30.0, backend=backend) * row_scale

    logits, row_scale = normal(3, 50).requires_grad_(), torch.rand(3)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (eager, got) = (f(logits, row_scale) for f in (run, compiled))
    assert torch.equal(eager, got)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logits)[0] for x in (eager, got)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_masked_with_the_least_finite_number(backend: str, dtype: torch.dtype) -> None:
    """Whole steps of finfo.min before the first usual logit: the maximum then rises by 3e38."""
    logits = normal(2, 3 * 8192, dtype)
    expected = logits.clone()
    expected[:, : 2 * 8192] = -INF
    logits[:, : 2 * 8192] = torch.finfo(dtype).min
    got, want = (
        softmax_entropy_grad_(z, torch.ones(2), backend=backend) for z in (logits, expected)
    )
    assert got.isfinite().all()
    assert torch.equal(got, want)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("softcap", [1e-3, 1000.0, 1e6, 1e30])
def test_softcap_of_any_size(backend: str, softcap: float) -> None:
    """tanh keeps its relative accuracy near 0: a large cap leaves the logits as they are."""
    logits = normal(4, 500)
    truth = rows_truth(logits, softcap=softcap)
    entropy = softmax_entropy(logits, softcap=softcap, backend=backend)
    assert ((entropy - truth.value).abs() <= truth.value_bound).all()
