"""The windows of a recovery: some are held out, the others are trained on, pass after pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import CalibrationOptions, RecoveryOptions
from hfprune_fast.console import say
from hfprune_fast.data.batches import MicroBatch, TokenData
from hfprune_fast.data.calibration import window_tokens, windows_of
from hfprune_fast.errors import CalibrationError

_HELD_OUT_PART = 10  # of so many windows of a short text one is held out at most


@dataclass(frozen=True)
class RecoveryData:
    """Windows of one text: no window's tokens attend to another's.

    Args:
        data: all windows, (N, T), in one batch.
        held_out: numbers of the windows that are only evaluated.
        taught: numbers of the windows that the dense model runs over.
        order: numbers of those that are trained on, in the order of the training.
        step_windows: how many are one step; `order` is a multiple of it.
    """

    data: TokenData
    held_out: tuple[int, ...]
    taught: Sequence[int]
    order: tuple[int, ...]
    step_windows: int

    @property
    def ids(self) -> Tensor:
        """Return all windows, (N, T) int64."""
        return self.data.batches[0].ids

    @cached_property
    def of_teacher(self) -> TokenData:
        """Return the windows that the dense model runs over."""
        if len(self.taught) == self.data.sequences:
            return self.data
        ids = self.ids[list(self.taught)]
        return replace(self.data, batches=[MicroBatch(ids, (ids.shape[1],) * len(ids))])

    @cached_property
    def _places(self) -> dict[int, int]:
        return {number: place for place, number in enumerate(self.taught)}

    def places(self, numbers: Sequence[int]) -> list[int] | None:
        """Return where windows are in `of_teacher`; None where one of them is not."""
        found = [self._places[n] for n in numbers if n in self._places]
        return found if len(found) == len(numbers) else None

    @property
    def window_tokens(self) -> int:
        return self.data.longest

    @property
    def steps(self) -> int:
        return len(self.order) // self.step_windows

    @property
    def tokens(self) -> int:
        """Tokens that are trained on, each pass counted."""
        return len(self.order) * self.window_tokens


def recovery_data(
    text: str | Path,
    dense: ModelSource,
    sampling: CalibrationOptions,
    options: RecoveryOptions,
    processes: int = 1,
) -> RecoveryData:
    """Read as many windows as the tokens take and the held-out ones beside them.

    Which are held out, and the order of each pass, are drawn by the seed. A step has as many
    windows for each process.

    Raises:
        CalibrationError: of too few windows, one in ten cannot be held out.
    """
    tokens = window_tokens(text, dense, sampling)
    if "ce" in options.loss and tokens == 1:
        raise CalibrationError(
            f"loss {options.loss} needs samples of 2 tokens or more, got 1: it is of the next token"
        )
    requested = min(options.batch_tokens, options.tokens)
    step_windows = max(1, requested // tokens // processes) * processes
    step_tokens = step_windows * tokens
    if not 0 <= requested - step_tokens < tokens:
        beside = f", the same number for each of {processes} processes" if processes > 1 else ""
        say(
            f"a step is of {step_tokens:,} tokens, not {requested:,}: it takes whole "
            f"samples of {tokens:,}{beside}"
        )
    steps = max(1, round(options.tokens / step_tokens))
    trained = steps * step_windows
    wanted = replace(sampling, samples=trained + options.held_out)
    data = windows_of(text, dense, wanted)
    number = data.sequences
    held_out = options.held_out
    if number < trained + held_out:
        held_out = min(held_out, number // _HELD_OUT_PART)
    if held_out < 1:
        raise CalibrationError(
            f"{text} holds {number} samples of {tokens} tokens, and recovery needs "
            f"{_HELD_OUT_PART} or more, one of which is held out; give more text or a smaller "
            "--seq-len"
        )
    drawn = _shuffled(list(range(number)), f"{sampling.seed}:held-out")
    rest = drawn[held_out:]
    passes = trained / len(rest)
    if passes > 1:
        say(
            f"{text} holds {len(rest) * tokens:,} tokens to train on: {passes:,.1f} passes over "
            f"them make {trained * tokens:,}"
        )
    order: list[int] = []  # of a typing error's number of tokens it takes a while
    while len(order) < trained:
        order += _shuffled(rest, f"{sampling.seed}:{len(order) // len(rest)}")
    evaluated = tuple(drawn[:held_out])
    # Training by cross entropy alone compares nothing with the dense model; the evaluation does.
    taught = range(number) if options.trains_on_dense else evaluated
    return RecoveryData(data, evaluated, taught, tuple(order[:trained]), step_windows)


def _shuffled(numbers: list[int], key: str) -> list[int]:
    """Return the numbers in an order that is the same on every machine."""
    return sorted(numbers, key=lambda n: hashlib.sha256(f"{key}:{n}".encode()).digest())
