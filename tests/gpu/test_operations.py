"""Every operation as its caller sees it."""

from collections.abc import Callable

import pytest
import torch
from on_gpu import BF16, DEVICE, FP16, FP32, gated_inputs, randn
from operations import OPERATIONS, SMALL, Inputs, registrations
from torch import Tensor

from hfprune_fast.kernels import softmax_entropy
from hfprune_fast.kernels._dispatch import resolve_backend


def softmax_entropy_backward(x: Inputs) -> list[Tensor]:
    logits = x.logits.clone().requires_grad_()
    return [*torch.autograd.grad(softmax_entropy(logits), logits, x.scale)]


each_operation = pytest.mark.parametrize("call", OPERATIONS.values(), ids=[*OPERATIONS])


@pytest.fixture
def large() -> Inputs:
    """Sizes of real models."""
    keys = torch.arange(2048, device=DEVICE) * 61
    return Inputs(
        randn(2048, 32000, scale=3), torch.rand(2048, device=DEVICE),
        randn(2048, 2048), randn(128_256, 2048, scale=3 / 45), keys,
        *gated_inputs((4, 512, 11008)),
    )  # fmt: skip


@pytest.mark.parametrize("call", [*OPERATIONS.values(), softmax_entropy_backward])
def test_repeats_bit_for_bit_and_never_waits_for_the_device(
    call: Callable[[Inputs], list[Tensor]], large: Inputs
) -> None:
    first, again = call(large), call(large)
    assert all(map(torch.equal, again, first))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        again = call(large)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, again, first))


@each_operation
def test_compiles_whole(call: Callable[[Inputs], list[Tensor]], large: Inputs) -> None:
    compiled = torch.compile(call, fullgraph=True)(large)
    assert all(map(torch.equal, compiled, call(large)))


def test_a_gpu_tensor_goes_to_triton() -> None:
    for dtype in (BF16, FP16, FP32):
        assert resolve_backend(None, torch.empty(1, dtype=dtype, device=DEVICE)) == "triton"


def test_opcheck() -> None:
    for operation, arguments in registrations(SMALL.to(DEVICE)):
        torch.library.opcheck(operation.default, (*arguments, None))
