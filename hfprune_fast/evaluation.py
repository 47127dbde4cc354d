"""How faithful a pruned model is: KL(dense || pruned), perplexity, top-1 agreement.

Both models run over the same token windows, and each row of logits is compared in fp32:

    kl_nats         mean over all positions of Σ_i p_i (log p_i - log q_i), p dense, q pruned
    ppl             exp of the mean cross entropy of the next token, over T - 1 positions a window
    top1_agreement  fraction of positions where both models' most likely token is the same
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfprune_fast.architectures import parts_of
from hfprune_fast.errors import ArgumentError, CalibrationError, NumericsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of logits compared at a time, over this many elements, bound the extra memory.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of a pruned model to its dense one on a text."""

    kl_nats: float
    ppl_dense: float
    ppl_pruned: float
    top1_agreement: float
    tokens: int


def evaluate(
    dense: PreTrainedModel, pruned: PreTrainedModel, batches: Iterable[Tensor]
) -> Fidelity:
    """Compare two loaded models over (B, T) batches of token ids, T at least 2.

    Raises:
        ArgumentError: the models have different vocabularies.
        CalibrationError: no batch.
        NumericsError: NaN or inf in a model's logits.
    """
    heads = [parts_of(model).head.weight for model in (dense, pruned)]
    vocab = heads[0].shape[0]
    if heads[1].shape[0] != vocab:
        raise ArgumentError(
            f"dense and pruned must share a vocabulary, got {vocab} and {heads[1].shape[0]} ids"
        )
    sums = torch.zeros(4, dtype=torch.float64)  # kl, cross entropy dense and pruned, agreements
    positions = predicted = 0
    with torch.inference_mode():
        for ids in batches:
            if ids.shape[1] < 2:
                raise CalibrationError(
                    f"evaluation needs windows of 2 tokens or more, got {ids.shape[1]}"
                )
            hidden = [_final_hidden(model, ids) for model in (dense, pruned)]
            # The last position of a window has no next token in it: -1 leaves it out.
            labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -1)], dim=1).flatten()
            rows = max(1, _CHUNK_ELEMENTS // vocab)
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                p_logits, q_logits = (
                    parts_of(model).head(h[chunk])
                    for model, h in zip((dense, pruned), hidden, strict=True)
                )
                sums += _compare(p_logits, q_logits, labels[chunk])
            positions += labels.numel()
            predicted += labels.numel() - len(ids)
    if positions == 0:
        raise CalibrationError("no token batches to evaluate on; expected at least one sequence")
    if not bool(sums.isfinite().all()):
        raise NumericsError("NaN or inf in the logits of the dense or the pruned model")
    kl, ce_dense, ce_pruned, agree = sums.tolist()
    return Fidelity(
        kl_nats=kl / positions,
        ppl_dense=float(torch.tensor(ce_dense / predicted, dtype=torch.float64).exp()),
        ppl_pruned=float(torch.tensor(ce_pruned / predicted, dtype=torch.float64).exp()),
        top1_agreement=agree / positions,
        tokens=positions,
    )


def _final_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    parts = parts_of(model)
    ids = ids.to(parts.head.weight.device, torch.int64)
    hidden: Tensor = parts.decoder(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)


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
