"""How a decoder calls its layers: recorded by its own forward, with stubs in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.models.sites import ModelParts

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]  # the arguments of each layer's call


class _NotInARowError(Exception):
    """The layers do not run one after the other, each on the output of the one before."""


# What `recorded_calls` raises for such a decoder, or for one that reads what a layer returns as a
# tuple where it is a tensor, or the other way round.
NOT_IN_A_ROW = (_NotInARowError, AttributeError, IndexError, TypeError, ValueError)


@torch.no_grad()
def recorded_calls(
    parts: ModelParts, ids: Tensor, embeddings: Tensor, *, in_tuples: bool
) -> tuple[Calls, Tensor]:
    """Return how each layer is called beside its input, and the first one's input (B, T, D).

    Args:
        ids: (B, T), on the model's device.
        embeddings: (B, T, D) of them.
        in_tuples: the decoder takes a layer's output out of a tuple.

    Raises:
        one of NOT_IN_A_ROW: the layers cannot be run alone, or `in_tuples` is wrong.
    """
    calls: Calls = []
    stream = _Stream()
    family = parts.family
    stubs: dict[str, nn.Module] = {
        family.layers: nn.ModuleList(
            _Layer(layer, calls, stream, in_tuples) for layer in parts.layers
        ),
        family.norm: _FinalNorm(stream),
        family.embedding: _Embedding(parts.embedding, embeddings),
    }
    with _replaced(parts.decoder, stubs):
        parts.decoder(input_ids=ids, use_cache=False, return_dict=True)
    if stream.hidden is None or len(calls) != len(parts.layers):
        raise _NotInARowError
    return calls, stream.hidden


def same_calls(some: Any, others: Any) -> bool:
    """Return whether the recorded arguments of calls are the same."""
    if isinstance(some, Tensor):
        return isinstance(others, Tensor) and torch.equal(some, others)
    if isinstance(some, dict):
        return some.keys() == others.keys() and all(same_calls(some[k], others[k]) for k in some)
    if isinstance(some, list | tuple):
        return len(some) == len(others) and all(map(same_calls, some, others))
    return some is others or bool(some == others)


@contextmanager
def _replaced(decoder: nn.Module, stubs: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the decoder has the stubs in place of its own modules at these paths."""
    own = {path: decoder.get_submodule(path) for path in stubs}
    try:
        for path, stub in stubs.items():
            decoder.set_submodule(path, stub)
        yield
    finally:
        for path, module in own.items():
            decoder.set_submodule(path, module)


class _Stream:
    """The hidden states, which must pass all layers and the final norm as one and the same."""

    hidden: Tensor | None = None

    def check(self, hidden: Tensor) -> None:
        if self.hidden is None:
            self.hidden = hidden
        if hidden is not self.hidden:
            raise _NotInARowError


class _Standing(nn.Module):
    """Stands in place of a module, whose attributes it has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["_module"] = module  # not as a submodule: its mode and hooks must not change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class _Embedding(_Standing):
    """Returns embeddings that are there already."""

    def __init__(self, module: nn.Module, embeddings: Tensor) -> None:
        super().__init__(module)
        self._embeddings = embeddings

    def forward(self, ids: Tensor) -> Tensor:
        return self._embeddings


class _Layer(_Standing):
    """Records how its layer is called and returns the input, in a tuple if the layer does."""

    def __init__(self, layer: nn.Module, calls: Calls, stream: _Stream, in_tuples: bool) -> None:
        super().__init__(layer)
        self._calls, self._stream, self._in_tuples = calls, stream, in_tuples

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        self._calls.append((args, kwargs))
        self._stream.check(hidden)
        return (hidden, None) if self._in_tuples else hidden


class _FinalNorm(nn.Module):
    """Returns what it is given."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, hidden: Tensor) -> Tensor:
        self._stream.check(hidden)
        return hidden
