"""First-order Taylor statistics of MLP neurons, summed over the tokens of whole sequences.

With a the input of down_proj and g = dloss/da, both (B, S, F), and x = g · a, per neuron j:

    l1          = Σ_bt |x_btj|           the importance of HFPrune (arXiv 2603.08083)
    l2          = Σ_bt x_btj²
    fisher_mask = Σ_b (Σ_t x_btj)²       squared derivative by a mask on the neuron (Fisher)
    act         = Σ_bt a_btj²

The kernels are in `_statistics_triton.py` and `csrc/taylor_pass.cpp`; they serve `gated_taylor.py`
too, where a comes from gate and up.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hfprune_fast.kernels._operation import operation
from hfprune_fast.kernels._statistics import sum_dtype, taylor_sums


class TaylorStatistics(NamedTuple):
    """The four statistics: (F,) of one layer here, (L, F) of a model in scoring."""

    l1: Tensor
    l2: Tensor
    fisher_mask: Tensor
    act: Tensor


def taylor_statistics_reference(grad: Tensor, act: Tensor) -> TaylorStatistics:
    """Return the statistics with every product whole, in fp64."""
    a = act.double()
    x = grad.double() * a
    return TaylorStatistics(
        l1=x.abs().sum(dim=(0, 1)),
        l2=x.square().sum(dim=(0, 1)),
        fisher_mask=x.sum(dim=1).square().sum(dim=0),
        act=a.square().sum(dim=(0, 1)),
    )


@operation("taylor_statistics")
def _taylor_statistics(
    grad: Tensor, act: Tensor, token_mask: Tensor | None, parity: bool, grad_scale: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    return taylor_sums(
        grad, act,
        token_mask=token_mask, parity=parity, grad_scale=grad_scale, backend=backend,
    )  # fmt: skip


@_taylor_statistics.register_fake
def _(grad, act, token_mask, parity, *_):
    return grad.new_empty(4, grad.shape[2], dtype=sum_dtype(grad, parity))


def taylor_statistics(
    grad: Tensor,
    act: Tensor,
    *,
    token_mask: Tensor | None = None,
    parity: bool = False,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> TaylorStatistics:
    """Return the four statistics of a micro-batch of whole sequences.

    With x = grad · act: l1 = Σ|x|, l2 = Σx², fisher_mask = Σ_seq (Σ_t x)², act = Σ act²; l1 is the
    importance of HFPrune (arXiv 2603.08083). Use it where only the input of down_proj is at hand;
    `gated_taylor` computes the backward pass of the activation as well.

    Args:
        grad: (B, S, F) dloss/dact, any float dtype; a copy is made unless B and S share one stride.
        act: (B, S, F), the input of down_proj, same dtype.
        token_mask: (B, S) bool, False at padding, which is neither counted nor read.
        parity: round every product, sum over a sequence and running total to the dtype of the
            input, as the reference implementation does, and return that dtype. Plain torch, without
            token_mask or grad_scale.
        grad_scale: power of two that grad carries (for fp16); taken out of the sums, exactly.
        backend: "triton", "cpp" or "torch"; by default HFPRUNE_BACKEND, else triton on a GPU, cpp
            on a CPU and torch elsewhere and for fp64. Parity always runs on torch.

    Returns:
        TaylorStatistics of (F,) tensors on the device of act, fp64 (parity: the input's dtype).

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    torch: fp64 throughout. triton and cpp: products and sums over 128 and 64 tokens in fp32, so
    terms below 1e-38 vanish, and fp64 beyond. Traffic: 4 bytes an element in bf16; on a GPU also
    0.25 of partial sums (more where sequences are shorter than 128 tokens: 32 bytes a neuron and
    sequence).
    """
    total = _taylor_statistics(grad, act, token_mask, parity, grad_scale, backend)
    return TaylorStatistics(*total.unbind())
