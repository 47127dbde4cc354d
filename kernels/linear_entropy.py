"""Weighted entropy of a language-model head, and its gradient at the head's input.

    z_t = hidden_t · weightᵀ + bias        loss = Σ_t row_weight_t · H(softmax(z_t))

The logits are never whole: rows go through one reused buffer, chunk by chunk, where
`softmax_entropy_grad_` turns them into dloss/dz, and a second product makes dloss/dhidden. That is
4·T·D·V FLOPs. The head is frozen: there is no gradient of weight or bias. The equation is in
`entropy.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels.entropy import softmax_entropy_grad_, softmax_entropy_grad_reference

_ROWS_MULTIPLE = 128


def linear_entropy_reference(
    hidden: Tensor, weight: Tensor, row_weight: Tensor, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (loss, dloss/dhidden) with the (T, V) logits whole."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    entropy, d_logits = softmax_entropy_grad_reference(logits, row_weight)
    return (entropy * row_weight).sum(), d_logits @ weight


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    row_weight: Tensor,
    *,
    bias: Tensor | None = None,
    logits_budget_bytes: int = 256 << 20,
) -> tuple[Tensor, Tensor]:
    """Return the weighted entropy of softmax(hidden · weightᵀ + bias) and its gradient at hidden.

    Args:
        hidden: (T, D), the input of the head.
        weight: (V, D), same dtype as hidden.
        row_weight: (T,) weight of each row in the loss; 0 leaves a row out.
        bias: (V,) or None.
        logits_budget_bytes: upper limit of the logits buffer, but at least 128 rows are taken.

    Returns:
        loss: scalar in nats, fp32 (fp64 for fp64 input).
        d_hidden: (T, D), same dtype as hidden.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (T, D) and weight (V, D), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must share a dtype, got {hidden.dtype}, {weight.dtype}"
        )
    tokens, vocab = hidden.shape[0], weight.shape[0]
    if row_weight.shape != (tokens,):
        raise ValueError(f"row_weight must be ({tokens},), got {tuple(row_weight.shape)}")
    rows_at_once = _chunk_rows(vocab * hidden.element_size(), logits_budget_bytes)
    chunk = max(1, min(tokens, rows_at_once))
    buffer = hidden.new_empty(chunk, vocab)
    d_hidden = torch.empty_like(hidden)
    loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32)).to(hidden.device)
    with torch.no_grad():
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            logits = buffer[: rows.stop - start]
            torch.mm(hidden[rows], weight.t(), out=logits)
            if bias is not None:
                logits += bias
            entropy = softmax_entropy_grad_(logits, row_weight[rows])
            loss += torch.dot(entropy, row_weight[rows].to(entropy.dtype))
            torch.mm(logits, weight, out=d_hidden[rows])
    return loss, d_hidden


def _chunk_rows(row_bytes: int, budget_bytes: int) -> int:
    rows = budget_bytes // max(1, row_bytes) // _ROWS_MULTIPLE * _ROWS_MULTIPLE
    return max(_ROWS_MULTIPLE, rows)
