"""How faithful a pruned model is: KL(dense || pruned), perplexity, top-1 and top-5 agreement.

Both models run over the same token windows, and each row of logits is compared in fp32:

    kl_nats         mean over all positions of Σ_i p_i (log p_i - log q_i), p dense, q pruned
    ppl             exp of the mean cross entropy of the next token, over T - 1 positions a window
    top1_agreement  fraction of positions where both models' most likely token is the same
    top5_agreement  fraction of positions where the pruned model's most likely token is among the
                    dense model's five: fewer than five are more likely there
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch, as_batches, token_data
from hfprune_fast.engine.layerwise import Head, ResidentModel, own_modes
from hfprune_fast.errors import ArgumentError, CalibrationError, NumericsError
from hfprune_fast.evaluation.changes import TokenChanges
from hfprune_fast.kernels import softmax_kl_grad_
from hfprune_fast.models.plain import plain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a model's logits, in the rows that are compared at a time: it bounds the extra memory.
_CHUNK_ELEMENTS = 1 << 22
# exp of more overflows; for a model that far off, KL is the number to read.
_MAX_CROSS_ENTROPY_NATS = 700.0


@dataclass(frozen=True)
class Fidelity:
    """What `evaluate` measures; the head of this file defines each value."""

    kl_nats: float
    ppl_dense: float
    ppl_pruned: float
    top1_agreement: float
    tokens: int
    top5_agreement: float


@own_modes()
def evaluate(dense: PreTrainedModel, pruned: PreTrainedModel, batches: Iterable[Any]) -> Fidelity:
    """Compare two loaded models over token batches as `hf.score` takes them; neither is changed.

    Adapters and quantised layers are run as they are; the heads must be plain linear layers.

    Raises:
        ArgumentError: the models have different vocabularies, or one is spread over devices.
        CalibrationError: no batch, a sequence of one token, or ids that the models do not have.
        NumericsError: NaN or inf in a weight, named, or in the logits.
    """
    models = [ResidentModel(plain_model(model, "evaluate")) for model in (dense, pruned)]
    with models[0] as p, models[1] as q:
        check_vocabularies(p.vocab, q.vocab)
        items = token_data(as_batches(batches), p.vocab).batches
        check_windows(items)
        return compare(items, p.final_hidden(items), q.final_hidden(items), p.head(), q.head())


class HeldOut:
    """Held-out windows and a dense model's hidden states over them, for several comparisons."""

    def __init__(self, dense: PreTrainedModel, batches: Sequence[MicroBatch]) -> None:
        check_windows(batches)
        self.batches = batches
        with ResidentModel(dense) as model:
            self._dense_hidden, self._dense_head = list(model.final_hidden(batches)), model.head()

    def measure(self, pruned: PreTrainedModel) -> Fidelity:
        """Compare a pruned model with the dense one."""
        with ResidentModel(pruned) as model:
            hidden, heads = model.final_hidden(self.batches), (self._dense_head, model.head())
            return compare(self.batches, self._dense_hidden, hidden, *heads)


def check_vocabularies(dense: int, pruned: int) -> None:
    """Refuse two models whose logits cannot be compared."""
    if dense != pruned:
        raise ArgumentError(
            f"dense and pruned must share a vocabulary, got {dense} and {pruned} ids"
        )


def check_windows(batches: Sequence[MicroBatch]) -> None:
    """Refuse sequences of one token, which have no next one."""
    shortest = min(min(batch.lengths) for batch in batches)
    if shortest < 2:
        raise CalibrationError(f"evaluation needs windows of 2 tokens or more, got {shortest}")


def compare(
    batches: Sequence[MicroBatch],
    dense_hidden: Iterable[Tensor],
    pruned_hidden: Iterable[Tensor],
    dense_head: Head,
    pruned_head: Head,
    changes: TokenChanges | None = None,
) -> Fidelity:
    """Compare two models by their heads' inputs, (B, T, D) of each batch.

    `changes` takes the KL of each position too.

    Raises:
        NumericsError: NaN or inf in the logits.
    """
    # kl, cross entropy dense and pruned, agreements with one and with five
    sums = torch.zeros(5, dtype=torch.float64)
    with torch.inference_mode():
        for batch, i, rows, (p, q) in _chunks(batches, dense_head, dense_hidden, pruned_hidden):
            ids = batch.ids[i, : batch.lengths[i]]
            # The last position of a window has no next token in it: -1 leaves it out.
            labels = torch.cat([ids[1:], ids.new_full((1,), -1)])[rows]
            p_logits, q_logits = dense_head(p), pruned_head(q)
            log_p = torch.log_softmax(p_logits.float(), dim=-1)
            log_q = torch.log_softmax(q_logits.to(log_p.device).float(), dim=-1)
            kl = _kl(log_p, log_q)
            sums += _sums(p_logits, q_logits, log_p, log_q, kl, labels)
            if changes is not None:
                changes.add(batch.first + i, rows.start, log_p, log_q, kl)
    _check_logits(sums[:3])
    kl_sum, ce_dense, ce_pruned, top1, top5 = sums.tolist()
    positions = sum(batch.tokens for batch in batches)
    predicted = positions - sum(len(batch.ids) for batch in batches)
    return Fidelity(
        kl_nats=kl_sum / positions,
        ppl_dense=_perplexity(ce_dense, predicted),
        ppl_pruned=_perplexity(ce_pruned, predicted),
        top1_agreement=top1 / positions,
        tokens=positions,
        top5_agreement=top5 / positions,
    )


@torch.inference_mode()
def kl_of_each(
    batches: Sequence[MicroBatch],
    dense_hidden: Sequence[Tensor],
    pruned_hidden: Sequence[Sequence[Tensor]],
    head: Head,
) -> list[float]:
    """Return KL(dense || pruned) in nats of several models that share a head.

    The dense model's logits are made once for all of them, and a row's KL is `softmax_kl_grad_`'s,
    in one pass over both rows; `compare` takes it from two log-softmaxes, so rounding differs.
    """
    sums = torch.zeros(len(pruned_hidden), dtype=torch.float64)
    for _, _, _, (p, *others) in _chunks(batches, head, dense_hidden, *pruned_hidden):
        dense = head(p)
        unused = dense.new_zeros(len(dense))  # a factor of the gradients
        for j, q in enumerate(others):
            sums[j] += float(softmax_kl_grad_(head(q), dense, unused).double().sum())
    _check_logits(sums)
    kl_nats: list[float] = (sums / sum(batch.tokens for batch in batches)).tolist()
    return kl_nats


def _chunks(
    batches: Iterable[MicroBatch], head: Head, *hidden: Iterable[Tensor]
) -> Iterator[tuple[MicroBatch, int, slice, list[Tensor]]]:
    """Yield a batch, a sequence's index in it, a chunk of its rows, and each model's (rows, D)."""
    max_rows = max(1, _CHUNK_ELEMENTS // len(head.weight))
    for batch, *each in zip(batches, *hidden, strict=True):
        for i, length in enumerate(batch.lengths):
            for start in range(0, length, max_rows):
                rows = slice(start, min(start + max_rows, length))
                yield batch, i, rows, [own[i, rows] for own in each]


def _check_logits(sums: Tensor) -> None:
    if not bool(sums.isfinite().all()):
        raise NumericsError("NaN or inf in the logits of the dense or the pruned model")


def _perplexity(cross_entropy: float, tokens: int) -> float:
    """Return the perplexity of tokens with that sum of cross entropy; NaN of none."""
    return math.exp(min(cross_entropy / tokens, _MAX_CROSS_ENTROPY_NATS)) if tokens else math.nan


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q), (rows,); where p is 0 (logit -inf) the term is 0, whatever q is."""
    return (log_p.exp() * (log_p - log_q)).masked_fill_(log_p == -torch.inf, 0).sum(dim=-1)


def _sums(
    dense: Tensor, pruned: Tensor, log_p: Tensor, log_q: Tensor, kl: Tensor, labels: Tensor
) -> Tensor:
    """Return the (5,) fp64 sums over one chunk of rows."""
    labels = labels.to(log_p.device)
    has_next = labels >= 0
    index = labels.clamp(min=0)[:, None]
    top = pruned.argmax(dim=-1, keepdim=True).to(dense.device)
    more_likely = (dense > dense.gather(1, top)).sum(dim=-1, dtype=torch.int32)
    return torch.stack(
        [
            kl.double().sum(),
            -log_p.gather(1, index)[has_next].double().sum(),
            -log_q.gather(1, index)[has_next].double().sum(),
            (dense.argmax(dim=-1) == top[:, 0]).double().sum(),
            (more_likely < 5).double().sum(),
        ]
    ).cpu()
