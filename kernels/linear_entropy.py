"""Weighted entropy of a language-model head's output, and its gradient at the head's input.

    z_t = hidden_t · weightᵀ + bias        loss = Σ_t row_weight_t · H(softmax(z_t))

The equation of H and its gradient are in `entropy.py`, the passage over chunks of rows in
`_linear.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._criterion import ENTROPY
from hfprune_fast.kernels._linear import linear_criterion
from hfprune_fast.kernels.entropy import softmax_entropy_grad_reference


def linear_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (loss, dloss/dhidden) with the (T, V) logits whole."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    entropy, d_logits = softmax_entropy_grad_reference(
        logits, row_weight, softcap=softcap, logit_scale=logit_scale
    )
    return (entropy * row_weight).sum(), d_logits @ weight


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    fp32_logits: bool = False,
    grad_scale: float = 1.0,
    logits_budget_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted entropy of a frozen head's output and its gradient at the head's input.

    loss = Σ_t row_weight_t · H(softmax(hidden_t · weightᵀ + bias)), the criterion of HFPrune (arXiv
    2603.08083); call `hidden.backward(d_hidden)` to go on below the head.

    Args:
        hidden: (T, D) fp32, bf16, fp16 or fp64, the input of the head.
        weight: (V, D), same dtype.
        row_weight: (T,) weight of each row in the loss, by default 1/T. For sequences of unequal
            length, 1 / length in each row of a sequence; 0 in rows of padding, which then add
            nothing, even if they hold NaN.
        bias: (V,), same dtype, or None.
        softcap, logit_scale: as in `softmax_entropy`, applied after the bias.
        fp32_logits: keep the logits of a bf16 or fp16 head in fp32. On a GPU their gradient is
            rounded to the head's dtype for the second product; on a CPU nothing is.
        grad_scale: power of two that multiplies d_hidden (for fp16, so that small gradients do not
            underflow). fp16's dz is finite while |row_weight| · logit_scale · max(grad_scale, 4096)
            is below 16384; d_hidden must fit as well.
        logits_budget_bytes: limit of the logits buffer and the other temporaries of a chunk of at
            least one row. By default 384 MiB, or 512 rows if that is more.
        backend: "triton", "cpp" or "torch"; by default HFPRUNE_BACKEND, else triton on a GPU, cpp
            on a CPU and torch elsewhere and for fp64.

    Returns:
        loss: scalar in nats, fp32 (fp64 for fp64 input); summed in fp64.
        d_hidden: (T, D), same dtype as hidden: grad_scale · dloss/dhidden.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    4·T·D·V FLOPs; extra memory is the budget, d_hidden and a few numbers a row (and on the torch
    path up to 10 MiB of temporaries, 20 for fp64). On a GPU, per logit in bf16: 2 bytes written and
    2 read by the products, 4 to 6 by the pass. No host synchronisation.
    """
    loss, d_hidden, *_ = linear_criterion(
        hidden, weight, row_weight, bias, ENTROPY,
        softcap=softcap, logit_scale=logit_scale, fp32_logits=fp32_logits,
        grad_scale=grad_scale, logits_budget_bytes=logits_budget_bytes, backend=backend,
    )  # fmt: skip
    return loss, d_hidden
