"""First-order Taylor statistics of MLP neurons, summed over the tokens of whole sequences.

With a = the input of down_proj and g = dloss/da, both (B, S, F), and x = g · a, per neuron j:

    l1   = Σ_bt |x_btj|              the paper's importance (arXiv 2603.08083)
    l2   = Σ_bt x_btj²
    mask = Σ_b (Σ_t x_btj)²          square of the derivative by a mask on the neuron (Fisher)
    act  = Σ_bt a_btj²

All four come from one read of g and a.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens a block: bounds the fp64 temporaries to a few times 128 · F · 8 bytes.
_BLOCK_TOKENS = 128


class TaylorStatistics(NamedTuple):
    """The four statistics, fp64: (F,) of one layer here, (L, F) of a model in scoring."""

    l1: Tensor
    l2: Tensor
    mask: Tensor
    act: Tensor


def taylor_statistics_reference(grad: Tensor, act: Tensor) -> TaylorStatistics:
    """Return the statistics with every product whole, in fp64."""
    a = act.double()
    x = grad.double() * a
    return TaylorStatistics(
        l1=x.abs().sum(dim=(0, 1)),
        l2=x.square().sum(dim=(0, 1)),
        mask=x.sum(dim=1).square().sum(dim=0),
        act=a.square().sum(dim=(0, 1)),
    )


def taylor_statistics(grad: Tensor, act: Tensor) -> TaylorStatistics:
    """Return the four statistics of a micro-batch of whole sequences.

    Args:
        grad: (B, S, F) dloss/da, any float dtype.
        act: (B, S, F), the input of down_proj.

    Returns:
        TaylorStatistics of (F,) fp64 tensors on the device of act.

    Raises:
        ValueError: grad and act differ in shape or are not 3-D.

    Products are made and added in fp64, so nothing under- or overflows and l1 of 16k samples is as
    exact as that of one. Reads grad and act once.
    """
    if grad.shape != act.shape or act.dim() != 3:
        raise ValueError(
            f"grad and act must both be (B, S, F), got {tuple(grad.shape)} and {tuple(act.shape)}"
        )
    batch, seq_len, width = act.shape
    total = TaylorStatistics(
        *(torch.zeros(width, dtype=torch.float64, device=act.device) for _ in range(4))
    )
    for b in range(batch):
        x_sum = torch.zeros_like(total.mask)
        for start in range(0, seq_len, _BLOCK_TOKENS):
            tokens = slice(start, start + _BLOCK_TOKENS)
            a = act[b, tokens].double()
            x = grad[b, tokens].double() * a
            total.l1.add_(x.abs().sum(dim=0))
            total.l2.add_(x.square().sum(dim=0))
            total.act.add_(a.square().sum(dim=0))
            x_sum.add_(x.sum(dim=0))
        total.mask.add_(x_sum.square_())
    return total
