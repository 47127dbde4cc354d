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
from tolerances import assert_no_worse
from torch import Tensor

from hfprune_fast.kernels import gated_taylor, taylor_statistics

WIDTHS = (11008, 14336, 18944, 7581)


def gated_definition(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(act, d_gate, d_up) in the dtype given, through autograd."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    if activation == "silu":
        act = torch.nn.functional.silu(gate) * up
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        act = torch.nn.functional.gelu(gate, approximate=approximate) * up
    return act.detach(), *torch.autograd.grad(act, (gate, up), grad)


def statistics(grad: Tensor, act: Tensor) -> Tensor:
    """l1, l2, fisher_mask, act of one sequence (S, F), as (4, F) in the dtype given."""
    x = grad * act
    return torch.stack(
        [x.abs().sum(0), x.square().sum(0), x.sum(0).square(), act.square().sum(0)]
    )  # fmt: skip


# A program adds 16 terms in a row and then 8 in a tree, in fp32.
STATISTICS_FLOOR = 16 * EPS_32


def check_gated(
    got: tuple[tuple[Tensor, ...], Tensor, Tensor], inputs: tuple[Tensor, Tensor, Tensor],
    activation: str, token_mask: Tensor | None = None,
) -> None:  # fmt: skip
    dtype, width = inputs[0].dtype, inputs[0].shape[2]
    stored = torch.finfo(dtype).eps
    true_sums, eager_sums = torch.zeros(2, 4, width, dtype=torch.float64, device=DEVICE)
    for b in range(len(inputs[0])):
        sequence = tuple(tensor[b] for tensor in inputs)
        if token_mask is not None:
            sequence = tuple(t.masked_fill(~token_mask[b][:, None], 0) for t in sequence)
        grad, gate, up = (t.double() for t in sequence)
        true_act, *true = gated_definition(grad, gate, up, activation)
        eager_act, *eager = gated_definition(*sequence, activation)
        true_sums += statistics(grad, true_act)
        eager_sums += statistics(grad, eager_act.double())
        # The derivatives have zeros where their terms of size up to 1 + |gate| cancel.
        size = (16 * EPS_32 * grad * (1 + gate.abs())).abs()
        for i, terms in enumerate((size * up.abs(), size)):
            allowed = 2 * (eager[i].double() - true[i]).abs() + stored * true[i].abs()
            allowed += terms + smallest_step(dtype)
            assert ((got[1 + i][b].double() - true[i]).abs() <= allowed).all(), f"sequence {b}"
    assert_no_worse(torch.stack(got[0]), eager_sums, true_sums, floor=STATISTICS_FLOOR)


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_taylor_widths(width: int) -> None:
    inputs = gated_inputs((8, 1024, width))
    with poisoned():
        got = gated_taylor(*inputs)
    check_gated(got, inputs, "silu")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_taylor_activations(activation: str, dtype: torch.dtype) -> None:
    inputs = gated_inputs((2, 1000, 11008), dtype)
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
    check_gated(got, before, "silu", token_mask)
    assert torch.equal(grad.nan_to_num(), before[0].nan_to_num())


def test_gated_taylor_past_two_to_the_31_elements() -> None:
    need_gib(16)
    grad, gate, up = gated_inputs((56, 1024, 18944), fused=True)  # rows are 37888 apart
    before = grad, gate.clone(), up.clone()
    check_gated(gated_taylor(grad, gate, up, overwrite=True), before, "silu")


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", [14336, 7581])
def test_taylor_statistics(width: int, dtype: torch.dtype) -> None:
    shape = (8, 1000, width)
    grad, act = randn(*shape, dtype=dtype, scale=0.01), randn(*shape, dtype=dtype)
    with poisoned():
        got = taylor_statistics(grad, act)
    true, eager = torch.zeros(2, 4, width, dtype=torch.float64, device=DEVICE)
    for b in range(8):
        true += statistics(grad[b].double(), act[b].double())
        eager += statistics(grad[b].float(), act[b].float())
    assert_no_worse(torch.stack(got), eager, true, floor=STATISTICS_FLOOR)
