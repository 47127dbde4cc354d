"""The positions at which a pruned model changed most, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfprune_fast.data.batches import TokenData
from hfprune_fast.errors import MAX_CHARS
from hfprune_fast.evaluation.changes import Change

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class ChangedToken:
    """What a text says at a position, and what the two models expect next."""

    context: str
    position: int  # of the window's tokens; the next one is predicted there
    follows: str  # what the text goes on with; empty at a window's end
    dense_top: str
    dense_probability: float
    pruned_top: str
    pruned_probability: float
    kl_nats: float


def changed_tokens(
    changes: Sequence[Change], data: TokenData, tokenizer: PreTrainedTokenizerBase | None
) -> list[ChangedToken]:
    """Return changes as text, with ends of lines as ↵; as token ids without a tokenizer."""

    def text(ids: Sequence[int]) -> str:
        if tokenizer is None:
            return " ".join(f"#{token}" for token in ids)
        decoded = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        return decoded.replace("\r\n", "\n").replace("\n", "↵")

    windows = {
        batch.first + row: batch.ids[row, :length]
        for batch in data.batches
        for row, length in enumerate(batch.lengths)
    }
    changed = []
    for change in changes:
        ids, at = windows[change.sequence].tolist(), change.position
        changed.append(
            ChangedToken(
                context=text(ids[max(0, at + 1 - _CONTEXT_TOKENS) : at + 1])[-MAX_CHARS:],
                position=at,
                follows=text(ids[at + 1 : at + 2])[:MAX_CHARS],
                dense_top=text([change.dense_top])[:MAX_CHARS],
                dense_probability=change.dense_probability,
                pruned_top=text([change.pruned_top])[:MAX_CHARS],
                pruned_probability=change.pruned_probability,
                kl_nats=change.kl_nats,
            )
        )
    return changed
