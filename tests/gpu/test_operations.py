"""Every operation as its caller sees it."""

from collections.abc import Callable

import pytest
import torch
from on_gpu import BF16, DEVICE, FP16, FP32, gated_inputs, randn
from torch import Tensor

from hfprune_fast.kernels import (
    gated_taylor,
    linear_cross_entropy,
    linear_entropy,
    linear_fisher,
    softmax_entropy,
    softmax_entropy_grad_,
    taylor_statistics,
)
from hfprune_fast.kernels._dispatch import resolve_backend


def differentiate(logits: Tensor, row_scale: Tensor) -> tuple[Tensor, ...]:
    return (softmax_entropy(logits),)


def overwrite_logits(logits: Tensor, row_scale: Tensor) -> tuple[Tensor, ...]:
    grad = logits.clone()
    return softmax_entropy_grad_(grad, row_scale), grad


def overwrite_gated(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    sums, d_gate, d_up = gated_taylor(grad, gate.clone(), up.clone(), overwrite=True)
    return *sums, d_gate, d_up


def new_gated(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    sums, d_gate, d_up = gated_taylor(grad, gate, up)
    return *sums, d_gate, d_up


def head_in_fp32(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return linear_entropy(hidden, weight, fp32_logits=True)


def head_with_labels(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    labels = torch.arange(len(hidden), device=DEVICE) * 61
    return linear_cross_entropy(hidden, weight, labels)


def head_that_draws(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return linear_fisher(hidden, weight, torch.arange(len(hidden), device=DEVICE), seed=3)


CALLS: list[tuple[Callable[..., tuple[Tensor, ...]], str]] = [
    (differentiate, "rows"),
    (overwrite_logits, "rows"),
    (linear_entropy, "head"),
    (head_in_fp32, "head"),
    (head_with_labels, "head"),
    (head_that_draws, "head"),
    (taylor_statistics, "act"),
    (new_gated, "mlp"),
    (overwrite_gated, "mlp"),
]
every_call = pytest.mark.parametrize(
    ("function", "kind"), CALLS, ids=[function.__name__ for function, _ in CALLS]
)


def inputs_of(kind: str) -> tuple[Tensor, ...]:
    if kind == "rows":
        return randn(2048, 32000, scale=3).requires_grad_(), torch.rand(2048, device=DEVICE)
    if kind == "head":
        return randn(2048, 2048), randn(128_256, 2048, scale=3 / 45)
    return gated_inputs((4, 512, 11008))[: 2 if kind == "act" else 3]


def results(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """What a call returns, and the gradient of what can be differentiated."""
    out = list(function(*inputs))
    if out[0].requires_grad and out[0].grad_fn is not None:
        out += torch.autograd.grad(out[0], inputs[0], inputs[1])
    return [tensor.detach() for tensor in out]


@every_call
def test_repeats_bit_for_bit(function: Callable[..., tuple[Tensor, ...]], kind: str) -> None:
    inputs = inputs_of(kind)
    first = results(function, *inputs)
    for _ in range(2):
        assert all(map(torch.equal, results(function, *inputs), first))


@every_call
def test_never_waits_for_the_device(function: Callable[..., tuple[Tensor, ...]], kind: str) -> None:
    inputs = inputs_of(kind)
    first = results(function, *inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        again = results(function, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, again, first))


@every_call
def test_compiles_whole(function: Callable[..., tuple[Tensor, ...]], kind: str) -> None:
    inputs = inputs_of(kind)
    compiled = results(torch.compile(function, fullgraph=True), *inputs)
    assert all(map(torch.equal, compiled, results(function, *inputs)))


def test_a_gpu_tensor_goes_to_triton() -> None:
    for dtype in (BF16, FP16, FP32):
        assert resolve_backend(None, torch.empty(1, dtype=dtype, device=DEVICE)) == "triton"


def test_opcheck() -> None:
    ops = torch.ops.hfprune_fast
    logits, scale = randn(5, 97), torch.rand(5, device=DEVICE)
    gated = gated_inputs((2, 7, 65))
    leaf = logits.clone().requires_grad_()
    mask = torch.rand(2, 7, device=DEVICE) < 0.8
    new = torch.empty_like(gated[1]), torch.empty_like(gated[2])
    head = randn(6, 64), randn(97, 64), torch.rand(6, device=DEVICE), None
    ids = torch.arange(6, device=DEVICE)
    for operation, arguments in [
        (ops.softmax_entropy, (leaf, None, 1.0, None)),
        (ops.softmax_entropy_backward, (logits, scale, 30.0, 1.0, None)),
        (ops.softmax_entropy_grad_, (logits, scale, None, 1.0, None)),
        (ops.linear_criterion, (*head, "entropy", None, 0, None, 1.0, False, 1.0, None, None)),
        (ops.linear_criterion, (*head, "fisher", ids, 7, None, 1.0, True, 1.0, None, None)),
        (ops.taylor_statistics, (*gated[:2], mask, False, 1.0, None)),
        (ops.gated_taylor_, (*gated, "silu", None, False, 1.0, None)),
        (ops.gated_taylor_out, (*gated, *new, "gelu", mask, False, 1.0, None)),
    ]:
        torch.library.opcheck(operation.default, arguments)
