"""The MLP at the sizes of real models."""

import pytest
import torch
from on_gpu import (
    BF16,
    DEVICE,
    EPS_32,
    FP16,
    FP32,
    gated_inputs,
    need_gib,
    poisoned,
    randn,
    smallest_step,
)
from taylor_truth import eager_sums
from tolerances import assert_no_worse
from torch import Tensor

from hfprune_fast.kernels import (
    gated_taylor,
    gated_taylor_reference,
    taylor_statistics,
    taylor_statistics_reference,
)

# A program adds 16 terms in a row and then 8 in a tree, in fp32.
STATISTICS_FLOOR = 16 * EPS_32


def check_gated(
    got: tuple[tuple[Tensor, ...], Tensor, Tensor], inputs: tuple[Tensor, Tensor, Tensor],
    activation: str = "silu", token_mask: Tensor | None = None,
) -> None:  # fmt: skip
    dtype, width = inputs[0].dtype, inputs[0].shape[2]
    true_sums, rounded_sums = torch.zeros(2, 4, width, dtype=torch.float64, device=DEVICE)
    for b in range(len(inputs[0])):
        sequence = [tensor[b : b + 1] for tensor in inputs]
        if token_mask is not None:
            sequence = [t.masked_fill(~token_mask[b][:, None], 0) for t in sequence]
        grad, gate, up = (t.double() for t in sequence)
        true, *true_grads = gated_taylor_reference(grad, gate, up, activation=activation)
        eager, *eager_grads = gated_taylor_reference(*sequence, activation=activation)
        true_sums += torch.stack(true)
        rounded_sums += torch.stack(eager)
        # The derivatives have zeros where their terms of size up to 1 + |gate| cancel.
        size = (16 * EPS_32 * grad * (1 + gate.abs())).abs()
        for i, terms in enumerate((size * up.abs(), size)):
            allowed = 2 * (eager_grads[i].double() - true_grads[i]).abs() + smallest_step(dtype)
            allowed += terms + torch.finfo(dtype).eps * true_grads[i].abs()
            assert ((got[1 + i][b].double() - true_grads[i]).abs() <= allowed).all(), b
    assert_no_worse(torch.stack(got[0]), rounded_sums, true_sums, floor=STATISTICS_FLOOR)


@pytest.mark.parametrize(
    ("shape", "dtype", "activation"),
    [
        *(((8, 1024, width), BF16, "silu") for width in (11008, 14336, 18944, 7581)),
        *(((2, 1000, 11008), dtype, "silu") for dtype in (FP16, FP32)),
        *(((2, 1000, 11008), dtype, "gelu") for dtype in (BF16, FP16, FP32)),
        *(((2, 1000, 11008), dtype, "gelu_tanh") for dtype in (BF16, FP16, FP32)),
    ],
)
def test_gated_taylor(shape: tuple[int, int, int], dtype: torch.dtype, activation: str) -> None:
    inputs = gated_inputs(shape, dtype)
    with poisoned():
        got = gated_taylor(*inputs, activation=activation)
    check_gated(got, inputs, activation)


@pytest.mark.parametrize("width", [14336, 7581])
@pytest.mark.parametrize("fused", [False, True])
def test_gated_taylor_over_padded_inputs(fused: bool, width: int) -> None:
    grad, gate, up = gated_inputs((3, 1001, width), fused=fused)
    token_mask = torch.rand(3, 1001, device=DEVICE) < 0.8
    token_mask[1] = False
    for tensor in (grad, gate, up):
        tensor[~token_mask] = torch.nan
    before = grad.clone(), gate.clone(), up.clone()
    got = gated_taylor(grad, gate, up, overwrite=True, token_mask=token_mask)
    assert [t.data_ptr() for t in got[1:]] == [gate.data_ptr(), up.data_ptr()]
    check_gated(got, before, token_mask=token_mask)
    assert torch.equal(grad.nan_to_num(), before[0].nan_to_num())


def test_gated_taylor_past_two_to_the_31_elements() -> None:
    need_gib(16)
    grad, gate, up = gated_inputs((56, 1024, 18944), fused=True)  # rows are 37888 apart
    before = grad, gate.clone(), up.clone()
    check_gated(gated_taylor(grad, gate, up, overwrite=True), before)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", [14336, 7581])
def test_taylor_statistics(width: int, dtype: torch.dtype) -> None:
    grad, act = randn(8, 1000, width, dtype=dtype, scale=0.01), randn(8, 1000, width, dtype=dtype)
    with poisoned():
        got = taylor_statistics(grad, act)
    true = torch.zeros(4, width, dtype=torch.float64, device=DEVICE)
    for b in range(8):
        true += torch.stack(taylor_statistics_reference(grad[b : b + 1], act[b : b + 1]))
    eager = eager_sums(grad.float(), act.float())
    assert_no_worse(torch.stack(got), eager, true, floor=STATISTICS_FLOOR)
