"""The differentiable losses of a head: linear_kl_loss and linear_cross_entropy_loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_inputs import random
from paths import slow_in_triton
from tolerances import assert_no_worse
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from watch import Watch

from hfprune_fast.kernels import (
    linear_cross_entropy,
    linear_cross_entropy_loss,
    linear_kl,
    linear_kl_loss,
)

TOKENS, WIDTH, VOCAB = 7, 5, 13
CAPPED: dict[str, Any] = {"softcap": 4.0, "logit_scale": 1.5}
BUDGET = 400  # some rows at a time


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """hidden, weight and bias, which require gradients."""
    shapes = (TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    made = (random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return [tensor.requires_grad_() for tensor in made]


def teacher(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random(TOKENS, 4, dtype=dtype, seed=7), random(VOCAB, 4, dtype=dtype, seed=8)


def kl_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    options = {"temperature": 2.0, "teacher_softcap": 9.0, **options}
    return linear_kl_loss(hidden, weight, *teacher(hidden.dtype), bias=bias, **options)


LABELS = torch.tensor([3, -100, 12, 0, 7, 7, 1])


def cross_entropy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    return linear_cross_entropy_loss(hidden, weight, LABELS, bias=bias, **options)


def plain_kl(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """kl_loss, CAPPED, in the dtype of hidden or fp32."""
    teacher_hidden, teacher_weight = teacher(hidden.dtype)
    log_q = capped(torch.nn.functional.linear(hidden, weight, bias), 4.0, 1.5, 2.0)
    log_p = capped(teacher_hidden @ teacher_weight.T, 9.0, 1.0, 2.0)
    return (log_p.exp() * (log_p - log_q)).sum() / TOKENS


def plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    log_q = capped(torch.nn.functional.linear(hidden, weight, bias), 4.0, 1.5, 1.0)
    return torch.nn.functional.nll_loss(log_q, LABELS, reduction="sum") / TOKENS


def capped(logits: Tensor, softcap: float, scale: float, temperature: float) -> Tensor:
    z = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (softcap * torch.tanh(z / softcap) / temperature).log_softmax(dim=1)


LOSSES: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
    (kl_loss, plain_kl), (cross_entropy_loss, plain_cross_entropy),
]  # fmt: skip
each_loss = pytest.mark.parametrize(
    ("loss_of", "plain"), LOSSES, ids=["kl", "cross_entropy"]
)  # fmt: skip


@each_loss
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "all"])
def test_gradients_equal_finite_differences(
    loss_of: Callable[..., Tensor], plain: Callable[..., Tensor], trained: str
) -> None:
    names, tensors = ("hidden", "weight", "bias"), inputs()
    for name, tensor in zip(names, tensors, strict=True):
        tensor.requires_grad_(trained in (name, "all"))

    def run(*tensors: Tensor) -> Tensor:
        return 3 * loss_of(*tensors, logits_budget_bytes=BUDGET, grad_scale=8.0, **CAPPED)

    assert torch.autograd.gradcheck(run, tensors)
    grads = torch.autograd.grad(run(*tensors), [t for t in tensors if t.requires_grad])
    assert len(grads) == (3 if trained == "all" else 1)


@slow_in_triton
@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_no_worse_than_autograd(
    backend: str, loss_of: Callable[..., Tensor], plain: Callable[..., Tensor],
    dtype: torch.dtype, fp32_logits: bool,
) -> None:  # fmt: skip
    tensors = inputs(dtype)
    options = {"fp32_logits": fp32_logits, "logits_budget_bytes": BUDGET, "backend": backend}
    eager = torch.autograd.grad(plain(*tensors), tensors)
    grads = torch.autograd.grad(loss_of(*tensors, **options, **CAPPED), tensors)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    truths = torch.autograd.grad(_in_float64(plain, wide, dtype), wide)
    # dz and the gradient are rounded once each.
    floor = 4 * torch.finfo(dtype).eps
    for ours, theirs, truth in zip(grads, eager, truths, strict=True):
        assert ours.dtype == dtype
        assert_no_worse(ours.flatten(), theirs.flatten(), truth.flatten(), floor=floor)


def _in_float64(plain: Callable[..., Tensor], wide: list[Tensor], dtype: torch.dtype) -> Tensor:
    """plain of wide tensors, whose teacher is as it was rounded to dtype."""
    rounded = tuple(tensor.double() for tensor in teacher(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "teacher", lambda _: rounded)
        return plain(*wide)


def test_the_loss_and_the_gradient_are_those_of_the_plain_functions(backend: str) -> None:
    hidden, weight, bias = inputs(torch.float32)
    options: dict[str, Any] = {"bias": bias, "backend": backend}
    for differentiable, plain, arguments in (
        (linear_kl_loss, linear_kl, teacher(torch.float32)),
        (linear_cross_entropy_loss, linear_cross_entropy, (LABELS,)),
    ):
        loss = differentiable(hidden, weight, *arguments, **options)  # type: ignore[operator]
        want, d_hidden = plain(hidden, weight, *arguments, **options)  # type: ignore[operator]
        assert torch.equal(loss, want)
        assert torch.equal(torch.autograd.grad(loss, hidden)[0], d_hidden)


@each_loss
def test_a_frozen_head_has_no_gradient_made(
    loss_of: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    of_kl = loss_of is kl_loss
    for trained in (False, True):
        hidden, weight, _ = inputs(torch.float32)
        weight.requires_grad_(trained)
        with FlopCounterMode(display=False) as flops:
            loss_of(hidden, weight, None)
        with Watch() as watch:
            loss_of(hidden, weight, None)
        student = (6 if trained else 4) * WIDTH
        counted = (student + 2 * 4 * of_kl) * TOKENS * VOCAB
        assert watch.flops == flops.get_total_flops() == counted


@each_loss
def test_low_precision_sums_the_weight_gradient_in_fp32(
    loss_of: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    """512 equal rows, one in a chunk: in bf16 the sum would stay where a row is half an ulp."""
    row, weight, _ = inputs(torch.bfloat16)
    of_teacher, teacher_weight = teacher(torch.bfloat16)

    def grad(rows: int) -> Tensor:
        hidden = row[:1].expand(rows, WIDTH)
        options: dict[str, Any] = {"row_weight": torch.ones(rows), "logits_budget_bytes": 1}
        if loss_of is kl_loss:
            teacher_hidden = of_teacher[:1].expand(rows, 4)
            loss = linear_kl_loss(hidden, weight, teacher_hidden, teacher_weight, **options)
        else:
            loss = linear_cross_entropy_loss(hidden, weight, LABELS[:1].expand(rows), **options)
        return torch.autograd.grad(loss, weight)[0].double()

    one = 512 * grad(1)
    assert ((grad(512) - one).abs() <= 2 * 2**-8 * one.abs()).all()


@each_loss
def test_the_backward_pass_multiplies_before_it_rounds(
    loss_of: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    """Also by a factor that fp16 cannot hold, as torch.amp.GradScaler's, 65536."""
    for dtype, factor in ((torch.bfloat16, 1 / 3), (torch.float16, 65536.0 * 2)):
        hidden, weight, _ = inputs(dtype)
        weight.requires_grad_(False)
        rare = {"row_weight": torch.full((TOKENS,), 2.0**-12)}
        loss = loss_of(hidden, weight, None, grad_scale=1024.0, **rare)
        (d_hidden,) = torch.autograd.grad(loss, hidden, torch.tensor(factor), retain_graph=True)
        (kept,) = torch.autograd.grad(loss, hidden, torch.tensor(1024.0))
        expected = (kept.double() * torch.tensor(factor / 1024).double()).to(dtype)
        assert d_hidden.isfinite().all()
        assert torch.equal(d_hidden, expected)


@each_loss
def test_what_cannot_be_differentiated_is_an_error(
    loss_of: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    hidden, weight, bias = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_of(hidden, weight, bias), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda h: loss_of(h, weight, bias))(hidden)
    assert not loss_of(hidden.detach(), weight.detach(), bias.detach()).requires_grad


@pytest.mark.slow
@each_loss
def test_compiles_whole(
    backend: str, loss_of: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> None:
    torch._dynamo.reset()
    tensors, rows = inputs(torch.float32), teacher(torch.float32)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"bias": bias, "backend": backend}
        if loss_of is kl_loss:
            return 2 * linear_kl_loss(2 * hidden, weight, *rows, **options)
        return 2 * linear_cross_entropy_loss(2 * hidden, weight, LABELS, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = (
        [loss, *torch.autograd.grad(loss, tensors)] for loss in (compiled(*tensors), run(*tensors))
    )
    assert all(map(torch.equal, found, expected))


def test_training_moves_the_student_to_the_teacher() -> None:
    hidden, weight, bias = inputs(torch.float32)
    optimizer = torch.optim.SGD([weight, bias], lr=0.5)
    losses = []
    for _ in range(6):
        loss = kl_loss(hidden, weight, bias, logits_budget_bytes=BUDGET)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
