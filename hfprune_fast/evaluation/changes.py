"""KL by position, and the positions where it is largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfprune_fast.data.batches import TokenData
from hfprune_fast.errors import MAX_CHARS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 16


@dataclass(frozen=True)
class Change:
    """One position of one window, and the next token that each model finds most likely there."""

    kl_nats: float
    sequence: int
    position: int
    dense_top: int  # a token id
    dense_probability: float
    pruned_top: int
    pruned_probability: float


@dataclass(frozen=True)
class PositionBin:
    """Neighbouring positions of the windows."""

    first: int
    last: int
    kl_nats: float  # the mean over its tokens
    tokens: int


class TokenChanges:
    """Collects KL by position, and the positions of the largest KL, largest first in `largest`.

    It keeps two numbers a position of a window, and so many changes.
    """

    def __init__(self, most: int = 20) -> None:
        self.largest: list[Change] = []
        self._most = most
        self._kl_nats = torch.zeros(0, dtype=torch.float64)  # (T,) sums
        self._tokens = torch.zeros(0, dtype=torch.int64)

    def add(self, sequence: int, start: int, log_p: Tensor, log_q: Tensor, kl: Tensor) -> None:
        """Take the rows from position `start` of a window.

        Args:
            log_p, log_q: (rows, V) of the dense and of the pruned model.
            kl: (rows,) nats.
        """
        end = start + len(kl)
        if end > len(self._kl_nats):
            more = end - len(self._kl_nats)
            self._kl_nats = torch.nn.functional.pad(self._kl_nats, (0, more))
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
        self._kl_nats[start:end] += kl.double().cpu()
        self._tokens[start:end] += 1
        kl_nats, rows = kl.topk(min(self._most, len(kl)))
        p, dense_top = log_p[rows].max(dim=-1)
        q, pruned_top = log_q[rows].max(dim=-1)
        columns = (kl_nats, rows + start, dense_top, p.exp(), pruned_top, q.exp())
        new = (
            Change(value, sequence, *others)
            for value, *others in zip(*(column.tolist() for column in columns), strict=True)
        )
        order = sorted([*self.largest, *new], key=lambda c: (-c.kl_nats, c.sequence, c.position))
        self.largest = order[: self._most]

    def by_position(self, most: int = 32) -> list[PositionBin]:
        """Return the mean KL of so many equal runs of positions at most, which hold all tokens."""
        bins, length = [], len(self._kl_nats)
        size = max(1, -(-length // most))
        for first in range(0, length, size):
            tokens = int(self._tokens[first : first + size].sum())
            kl_nats = float(self._kl_nats[first : first + size].sum()) / tokens
            bins.append(PositionBin(first, min(first + size, length) - 1, kl_nats, tokens))
        return bins


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
