"""Token batches, checked: sequences of a micro-batch are padded on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.errors import CalibrationError

_POSITION_BITS = 24  # of a row's number; the rest is its sequence's
_IDS_MUST_BE = "token batches must be (B, T) integers, or mappings with such input_ids"
_MASK_MUST_BE = "attention_mask must be (B, T) integers"


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that run together."""

    ids: Tensor  # (B, T) int64, on the CPU; 0 after each sequence's end
    lengths: tuple[int, ...]  # tokens of each sequence, 1 to T
    first: int = 0  # number of its first sequence in the run

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def token_mask(self) -> Tensor | None:
        """(B, T) bool, False where there is padding; None where there is none."""
        if min(self.lengths) == self.ids.shape[1]:
            return None
        return torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths)[:, None]

    @property
    def labels(self) -> Tensor:
        """(B, T) the next token at each position, -100 where there is none."""
        labels = torch.full_like(self.ids, -100)
        for row, length in enumerate(self.lengths):
            labels[row, : length - 1] = self.ids[row, 1:length]
        return labels

    @property
    def row_ids(self) -> Tensor:
        """(B, T) int64, unique within the run, the same however it is cut into micro-batches."""
        rows, positions = (torch.arange(n) for n in self.ids.shape)
        return ((self.first + rows)[:, None] << _POSITION_BITS) + positions

    def split(self, max_batch_size: int) -> list[MicroBatch]:
        """Return parts of at most `max_batch_size` sequences, each padded to its own longest."""
        parts = []
        for i in range(0, len(self.ids), max_batch_size):
            lengths = self.lengths[i : i + max_batch_size]
            ids = self.ids[i : i + max_batch_size, : max(lengths)]
            parts.append(MicroBatch(ids, lengths, self.first + i))
        return parts


def as_batches(batches: Any, batch_size: int = 1) -> Iterable[Any]:
    """Split one (N, T) tensor or array into batches; return an iterable of batches unchanged."""
    split: Iterable[Any] = batches
    if isinstance(batches, Tensor | np.ndarray) and batches.ndim > 0:
        split = torch.as_tensor(batches).split(batch_size)
    elif isinstance(batches, Mapping | Tensor | np.ndarray) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{_IDS_MUST_BE}, in a list or another iterable; got one {type(batches).__name__}"
        )
    return split


def micro_batch(batch: Any, vocab: int) -> MicroBatch:
    """Check a batch: (B, T) integers below vocab, or a mapping with input_ids and attention_mask.

    Padding may be on either side; it is moved to the right.
    """
    attention_mask = None
    if isinstance(batch, Mapping):
        batch, attention_mask = batch.get("input_ids"), batch.get("attention_mask")
    ids = _integers(batch, _IDS_MUST_BE)
    lengths = (ids.shape[1],) * len(ids)
    if attention_mask is not None:
        mask = _integers(attention_mask, _MASK_MUST_BE) != 0
        if mask.shape != ids.shape:
            raise CalibrationError(
                f"attention_mask must be {tuple(ids.shape)} as input_ids, got {tuple(mask.shape)}"
            )
        lengths = tuple(mask.sum(dim=1).tolist())
        runs = mask.int().diff(dim=1, prepend=torch.zeros(len(mask), 1, dtype=torch.int)) == 1
        if min(lengths) < 1 or int(runs.sum(dim=1).max()) > 1:
            raise CalibrationError("attention_mask must have one run of ones, 1 or more, in a row")
        padded = ids.new_zeros(len(ids), max(lengths))
        for row, length in enumerate(lengths):
            padded[row, :length] = ids[row][mask[row]]
        ids = padded
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= vocab:
        raise CalibrationError(
            f"token ids must be in 0..{vocab - 1} (the vocabulary), got {low if low < 0 else high}"
        )
    return MicroBatch(ids, lengths)


def numbered(batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """Return micro-batches whose sequences are numbered one after another."""
    first, out = 0, []
    for batch in batches:
        out.append(replace(batch, first=first))
        first += len(batch.ids)
    return out


def _integers(batch: Any, must_be: str) -> Tensor:
    """Return a batch as a non-empty (B, T) int64 tensor on the CPU."""
    try:
        ids = torch.as_tensor(batch)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(f"{must_be}, got {type(batch).__name__}") from None
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.is_complex():
        raise CalibrationError(f"{must_be}, not empty; got {tuple(ids.shape)} {ids.dtype}")
    return ids.to("cpu", torch.int64)


@dataclass(frozen=True)
class TokenData:
    """All token batches of a run, and where they came from."""

    batches: list[MicroBatch]  # as given, numbered
    description: dict[str, Any]  # for the provenance
    largest: int | None  # sequences of the largest batch; None where batches may be of any size

    @property
    def sequences(self) -> int:
        return sum(len(batch.ids) for batch in self.batches)

    @property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, padding included."""
        return max(batch.ids.shape[1] for batch in self.batches)

    @cached_property
    def sha256(self) -> str:
        """Digest of each sequence's length and ids: of the data and not of its batches."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for ids, length in zip(batch.ids.numpy().astype("<i8"), batch.lengths, strict=True):
                digest.update(f"{length}:".encode() + ids[:length].tobytes())
        return digest.hexdigest()

    def split(self, batch_size: int) -> list[MicroBatch]:
        """Return micro-batches of at most `batch_size` sequences."""
        return [part for batch in self.batches for part in batch.split(batch_size)]


def token_data(
    batches: Any, vocab_size: int, description: dict[str, Any] | None = None
) -> TokenData:
    """Check token batches, as `hf.score` takes them, and number their sequences.

    Raises:
        CalibrationError: no batch, or ids outside the vocabulary.
    """
    checked = numbered(micro_batch(b, vocab_size) for b in as_batches(batches, 1 << 62))
    if not checked:
        raise CalibrationError("no token batches; expected at least one sequence")
    is_one_tensor = isinstance(batches, Tensor) or hasattr(batches, "__array__")
    largest = None if is_one_tensor else max(len(batch.ids) for batch in checked)
    return TokenData(checked, description or {"source": "token batches"}, largest)
