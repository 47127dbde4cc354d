"""Where in a text a pruned model differs from its dense one: by position, and most of all."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappush, heappushpop

import torch
from torch import Tensor

LARGEST = 20
_MOST_BINS = 32


@dataclass(frozen=True, order=True)
class Change:
    """One position of one window: what follows it is what the models disagree on."""

    kl_nats: float
    # Negative, so that of equal changes the first in the text comes first.
    minus_sequence: int
    minus_position: int
    dense_top: int  # the most likely next token of the dense model, and its probability
    dense_probability: float
    pruned_top: int
    pruned_probability: float

    @property
    def sequence(self) -> int:
        return -self.minus_sequence

    @property
    def position(self) -> int:
        return -self.minus_position


@dataclass(frozen=True)
class PositionBin:
    """Neighbouring positions of the windows."""

    first: int
    last: int
    kl_nats: float  # the mean over its tokens
    tokens: int


class TokenChanges:
    """Collects KL by position and the LARGEST changes; (T,) numbers and LARGEST rows of memory."""

    def __init__(self, largest: int = LARGEST) -> None:
        self._count = largest
        self._heap: list[Change] = []
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
        values, rows = kl.topk(min(self._count, len(kl)))
        for value, row in zip(values.tolist(), rows.tolist(), strict=True):
            if len(self._heap) == self._count and value < self._heap[0].kl_nats:
                break
            p, dense_top = log_p[row].max(dim=-1)
            q, pruned_top = log_q[row].max(dim=-1)
            change = Change(
                value, -sequence, -(start + row),
                int(dense_top), float(p.exp()), int(pruned_top), float(q.exp()),
            )  # fmt: skip
            if len(self._heap) < self._count:
                heappush(self._heap, change)
            else:
                heappushpop(self._heap, change)

    @property
    def largest(self) -> list[Change]:
        """The positions with the largest KL, largest first."""
        return sorted(self._heap, reverse=True)

    def by_position(self) -> list[PositionBin]:
        """Return the mean KL of at most 32 equal runs of positions; together, all the tokens."""
        bins, length = [], len(self._kl_nats)
        size = max(1, -(-length // _MOST_BINS))
        for first in range(0, length, size):
            tokens = int(self._tokens[first : first + size].sum())
            kl_nats = float(self._kl_nats[first : first + size].sum()) / tokens
            bins.append(PositionBin(first, min(first + size, length) - 1, kl_nats, tokens))
        return bins
