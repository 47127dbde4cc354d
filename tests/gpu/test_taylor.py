"""The MLP at the sizes of real models."""

import pytest
import torch
from on_gpu import BF16, DEVICE, EPS_32, FP16, FP32, gated_inputs, need_gib, poisoned, randn
from taylor_truth import assert_gated, eager_sums
from tolerances import assert_no_worse

from hfprune_fast.kernels import gated_taylor, taylor_statistics, taylor_statistics_reference


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
    assert_gated(got, inputs, activation)


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
    assert_gated(got, before, "silu", token_mask)
    assert torch.equal(grad.nan_to_num(), before[0].nan_to_num())


def test_gated_taylor_past_two_to_the_31_elements() -> None:
    need_gib(16)
    grad, gate, up = gated_inputs((56, 1024, 18944), fused=True)  # rows are 37888 apart
    before = grad, gate.clone(), up.clone()
    assert_gated(gated_taylor(grad, gate, up, overwrite=True), before, "silu")


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
    assert_no_worse(torch.stack(got), eager, true, floor=16 * EPS_32)  # sums of 16, then of 8
