"""The backward pass of a gated MLP's activation, with the Taylor statistics of its neurons.

With a = act_fn(gate) · up the input of down_proj and g = dloss/da, all (B, S, F):

    d_gate = g · up · act_fn'(gate)      d_up = g · act_fn(gate)

and the four sums of `taylor.py` over x = g · a (HFPrune, arXiv 2603.08083), from one read of g,
gate and up, by the kernel of `_statistics_triton.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._activations import Gated, activate
from hfprune_fast.kernels._operation import operation
from hfprune_fast.kernels._statistics import sum_dtype, taylor_sums
from hfprune_fast.kernels.taylor import TaylorStatistics, taylor_statistics_reference


def gated_taylor_reference(
    grad: Tensor, gate: Tensor, up: Tensor, *, activation: str = "silu"
) -> tuple[TaylorStatistics, Tensor, Tensor]:
    """Return (statistics, d_gate, d_up), through autograd and out of place."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with torch.enable_grad():
        act = activate(gate, activation) * up
        d_gate, d_up = torch.autograd.grad(act, (gate, up), grad)
    return taylor_statistics_reference(grad, act.detach()), d_gate, d_up


@operation("gated_taylor_", mutates_args=("gate", "up"))
def _gated_taylor_(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, token_mask: Tensor | None,
    parity: bool, grad_scale: float, backend: str | None,
) -> Tensor:  # fmt: skip
    return taylor_sums(
        grad, Gated(gate, up, gate, up, activation),
        token_mask=token_mask, parity=parity, grad_scale=grad_scale, backend=backend,
    )  # fmt: skip


@operation("gated_taylor_out", mutates_args=("d_gate", "d_up"))
def _gated_taylor_out(
    grad: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, activation: str,
    token_mask: Tensor | None, parity: bool, grad_scale: float, backend: str | None,
) -> Tensor:  # fmt: skip
    return taylor_sums(
        grad, Gated(gate, up, d_gate, d_up, activation),
        token_mask=token_mask, parity=parity, grad_scale=grad_scale, backend=backend,
    )  # fmt: skip


@_gated_taylor_.register_fake
def _(grad, gate, up, activation, token_mask, parity, *_):
    return grad.new_empty(4, grad.shape[2], dtype=sum_dtype(grad, parity))


@_gated_taylor_out.register_fake
def _(grad, gate, up, d_gate, d_up, activation, token_mask, parity, *_):
    return grad.new_empty(4, grad.shape[2], dtype=sum_dtype(grad, parity))


def gated_taylor(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    overwrite: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    token_mask: Tensor | None = None,
    parity: bool = False,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> tuple[TaylorStatistics, Tensor, Tensor]:
    """Return the four statistics of act = act_fn(gate) · up and the gradients at gate and up.

    d_gate = grad · up · act_fn'(gate), d_up = grad · act_fn(gate), and the sums of
    `taylor_statistics`, from one read of the three inputs; act is never stored.

    Args:
        grad: (B, S, F) dloss/dact, any float dtype.
        gate, up: (B, S, F), same dtype as grad; separate tensors, or the halves of a fused one.
        activation: "silu", "gelu" or "gelu_tanh".
        overwrite: write the gradients over gate and up.
        out: (d_gate, d_up) to write to, if gate and up are still needed: each is one of the inputs
            itself or lies apart from them. New tensors if neither is given.
        token_mask: (B, S) bool, False at padding, which is neither counted nor read; its gradients
            are 0.
        parity, grad_scale, backend: as in `taylor_statistics`; the gradients keep the scale.

    Returns:
        (statistics, d_gate, d_up): TaylorStatistics as of `taylor_statistics`, and two (B, S, F).

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    The maths is fp32 (fp64 for fp64) from the inputs to the products. Traffic on a GPU: 10 bytes an
    element in bf16 (three reads, two writes) and 2.5 % of it for partial sums. Not differentiable.
    """
    if overwrite and out is not None:
        raise ValueError("overwrite=True and out exclude each other, got both; pass one of them")
    options = activation, token_mask, parity, grad_scale, backend
    if overwrite:
        total, d_gate, d_up = _gated_taylor_(grad, gate, up, *options), gate, up
    else:
        if out is None:  # contiguous, whatever the strides of gate and up
            out = gate.new_empty(gate.shape), up.new_empty(up.shape)
        d_gate, d_up = out
        total = _gated_taylor_out(grad, gate, up, d_gate, d_up, *options)
    return TaylorStatistics(*total.unbind()), d_gate, d_up
