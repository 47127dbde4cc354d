"""How faithful a pruned model is: KL(dense || pruned), perplexity, top-1 agreement.

Both models run over the same token windows, and each row of logits is compared in fp32:

    kl_nats         mean over all positions of Σ_i p_i (log p_i - log q_i), p dense, q pruned
    ppl             exp of the mean cross entropy of the next token, over T - 1 positions a window
    top1_agreement  fraction of positions where both models' most likely token is the same
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfprune_fast.architectures import parts_of
from hfprune_fast.errors import ArgumentError, CalibrationError, NumericsError
from hfprune_fast.forward import as_batches, check_ids, check_model, final_hidden, left_as_found

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of logits compared at a time, over this many elements, bound the extra memory.
_CHUNK_ELEMENTS = 1 << 24
# exp of more is no finite number; a model that far off is told by its KL.
_MOST_NATS = 700.0


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of a pruned model to its dense one on a text."""

    kl_nats: float
    ppl_dense: float
    ppl_pruned: float
    top1_agreement: float
    tokens: int


def evaluate(dense: PreTrainedModel, pruned: PreTrainedModel, batches: Iterable[Any]) -> Fidelity:
    """Compare two loaded models over (B, T) batches, or one (N, T) tensor, of ids; T at least 2.

    Both models are left as they were found.

    Raises:
        ArgumentError: the models have different vocabularies, or one is spread over devices.
        CalibrationError: no batch, or ids that the models do not have.
        NumericsError: NaN or inf in a weight, named, or in the logits.
    """
    p_parts, q_parts = parts_of(dense), parts_of(pruned)
    vocab = p_parts.head.weight.shape[0]
    if q_parts.head.weight.shape[0] != vocab:
        raise ArgumentError(
            "dense and pruned must share a vocabulary, "
            f"got {vocab} and {q_parts.head.weight.shape[0]} ids"
        )
    check_model(dense)
    check_model(pruned)
    rows = max(1, _CHUNK_ELEMENTS // vocab)
    sums = torch.zeros(4, dtype=torch.float64)  # kl, cross entropy dense and pruned, agreements
    positions = predicted = 0
    with torch.inference_mode(), left_as_found(dense), left_as_found(pruned):
        for batch in as_batches(batches):
            ids = check_ids(batch, vocab)
            if ids.shape[1] < 2:
                raise CalibrationError(
                    f"evaluation needs windows of 2 tokens or more, got {ids.shape[1]}"
                )
            p_hidden = final_hidden(p_parts, ids).flatten(0, 1)
            q_hidden = final_hidden(q_parts, ids).flatten(0, 1)
            # The last position of a window has no next token in it: -1 leaves it out.
            labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1).flatten()
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                p_logits, q_logits = p_parts.head(p_hidden[chunk]), q_parts.head(q_hidden[chunk])
                sums += _compare(p_logits, q_logits, labels[chunk])
            positions += labels.numel()
            predicted += labels.numel() - len(ids)
    if positions == 0:
        raise CalibrationError("no token batches to evaluate on; expected at least one sequence")
    kl, ce_dense, ce_pruned, agreements = sums.tolist()
    if not all(math.isfinite(x) for x in (kl, ce_dense, ce_pruned)):
        raise NumericsError("NaN or inf in the logits of the dense or the pruned model")
    return Fidelity(
        kl_nats=kl / positions,
        ppl_dense=math.exp(min(ce_dense / predicted, _MOST_NATS)),
        ppl_pruned=math.exp(min(ce_pruned / predicted, _MOST_NATS)),
        top1_agreement=agreements / positions,
        tokens=positions,
    )


def _compare(dense: Tensor, pruned: Tensor, labels: Tensor) -> Tensor:
    """Return the (4,) fp64 sums over one chunk of (rows, V) logits."""
    log_p = torch.log_softmax(dense.float(), dim=-1)
    log_q = torch.log_softmax(pruned.to(log_p.device).float(), dim=-1)
    labels = labels.to(log_p.device)
    # Where p is 0 (logit -inf) the term is 0, whatever q is.
    kl = (log_p.exp() * (log_p - log_q)).masked_fill_(log_p == -torch.inf, 0).sum(dim=-1)
    has_next = labels >= 0
    index = labels.clamp(min=0)[:, None]
    return torch.stack(
        [
            kl.double().sum(),
            -log_p.gather(1, index)[has_next].double().sum(),
            -log_q.gather(1, index)[has_next].double().sum(),
            (dense.argmax(dim=-1) == pruned.argmax(dim=-1).to(dense.device)).double().sum(),
        ]
    ).cpu()
