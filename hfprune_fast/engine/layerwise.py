"""Running a model that may be somebody else's one layer at a time: checked first, left as found.

A family's own forward does the set-up (embedding, masks, position embeddings): it runs once a
micro-batch with stubs in place of the layers, which record how each is called. Then the layers run
one by one, each called as recorded, so a layer's weights need to be in memory only while it runs.
`ResidentModel` has them all in memory; `streaming.StreamedModel` brings them.

Sequences of a micro-batch are padded on the right. Under causal attention no token sees what comes
after it, so padding needs no attention mask; it only must not be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.errors import ArgumentError, NumericsError
from hfprune_fast.models.sites import parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CALLS_KEPT = 16  # position embeddings and masks, of that many shapes of micro-batches


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight with NaN or inf, by its name."""
    if tensor.numel() == 0:
        return
    # The extremes show NaN and inf without a mask as large as the tensor.
    if not bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all()):
        raise NumericsError(f"tensor {name} holds NaN or inf; the checkpoint is damaged")


@dataclass(frozen=True)
class Linear:
    """A linear layer apart from its model."""

    weight: Tensor  # (V, D)
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.weight.device), self.weight, self.bias)


class ResidentModel:
    """A loaded model, one layer at a time.

    Use as a context: evaluation mode and frozen parameters inside, both restored afterwards.

    Raises:
        ArgumentError: the model is spread over devices.
        NumericsError: NaN or inf in a parameter, named.
        UnsupportedModelError: no known gated MLP.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = parts_of(model)
        self.device, self.dtype = self.parts.head.weight.device, self.parts.head.weight.dtype
        self._calls: dict[tuple[int, ...], list[tuple[Any, dict[str, Any]]]] = {}
        self._check()

    @property
    def vocab(self) -> int:
        return self.parts.head.weight.shape[0]

    def _check(self) -> None:
        devices = {str(parameter.device) for parameter in self.model.parameters()}
        if len(devices) != 1 or "meta" in devices:
            raise ArgumentError(
                f"the model must be on one device, got {', '.join(sorted(devices))}"
            )
        for name, parameter in self.model.named_parameters():
            check_finite(name, parameter)

    def __enter__(self) -> ResidentModel:
        self._training = {module: module.training for module in self.model.modules()}
        self._wanted_grad = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for parameter in self._wanted_grad:
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.clear()
        for module, mode in self._training.items():
            module.training = mode
        for parameter in self._wanted_grad:
            parameter.requires_grad_(True)

    def embed(self, ids: Tensor) -> Tensor:
        """Return (B, T, D) embeddings of token ids, on the model's device."""
        embeddings: Tensor = self.parts.embedding(ids.to(self.device))
        return embeddings

    @contextmanager
    def weights_of(self, layer: int, then: int) -> Iterator[None]:
        """A layer's weights are in place inside; `then` is the layer that will be asked for next.

        Layer number L is the final norm and the head.
        """
        yield

    def begin(self, batch: MicroBatch) -> Tensor:
        """Return the first layer's input (B, T, D), and record how the layers are to be called."""
        calls: list[tuple[Any, dict[str, Any]]] = []
        with torch.no_grad(), _stubs(self, calls):
            embeddings = self.embed(batch.ids)
            hidden: Tensor = self.parts.decoder(
                inputs_embeds=embeddings, use_cache=False, return_dict=True
            ).last_hidden_state
        assert len(calls) == len(self.parts.layers), "the decoder skipped a layer"
        if len(self._calls) >= _CALLS_KEPT:
            self._calls.clear()
        # They depend on nothing but the shape, so micro-batches of one shape share them.
        self._calls.setdefault(tuple(batch.ids.shape), calls)
        return hidden

    def run(self, layer: int, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Return a layer's output (B, T, D); its weights must be in place."""
        shape = tuple(batch.ids.shape)
        if shape not in self._calls:
            self.begin(batch)
        args, kwargs = self._calls[shape][layer]
        output: Tensor | tuple[Tensor, ...] = self.parts.layers[layer](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def head(self) -> Linear:
        """Return the head, which stays usable when other layers have run."""
        head = self.parts.head
        return Linear(head.weight, head.bias)

    def final_hidden(
        self, batches: Sequence[MicroBatch], done: Callable[[float], object] = lambda tokens: None
    ) -> Iterator[Tensor]:
        """Yield the head's input (B, T, D), after the final norm, of each micro-batch."""
        for batch in batches:
            yield from self._final_hidden([batch], done)

    @torch.no_grad()
    def _final_hidden(
        self, batches: Sequence[MicroBatch], done: Callable[[float], object]
    ) -> list[Tensor]:
        layers = len(self.parts.layers)
        hidden = [self.begin(batch) for batch in batches]
        for layer in range(layers):
            with self.weights_of(layer, then=layer + 1):
                for i, batch in enumerate(batches):
                    hidden[i] = self._hold(self.run(layer, hidden[i].to(self.device), batch))
                    done(batch.tokens / layers)
        with self.weights_of(layers, then=0):
            return [self._hold(self.parts.norm(h.to(self.device))) for h in hidden]

    def _hold(self, hidden: Tensor) -> Tensor:
        """Put away what is needed again when another layer has run for all micro-batches."""
        return hidden


@contextmanager
def _stubs(model: ResidentModel, calls: list[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Stubs that record their call in place of the layers, and no final norm."""
    parts = model.parts
    stubs = nn.ModuleList(_Stub(layer, calls) for layer in parts.layers)
    places = [(parts.family.layers, stubs), (parts.family.norm, nn.Identity())]
    found = []
    try:
        for path, instead in places:
            parent, _, name = path.rpartition(".")
            owner = parts.decoder.get_submodule(parent)
            found.append((owner, name, owner._modules[name]))
            owner._modules[name] = instead
        yield
    finally:
        for owner, name, module in found:
            owner._modules[name] = module


class _Stub(nn.Module):
    """Records how a layer is called and returns its input; any other attribute is the layer's."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Any, dict[str, Any]]]) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule, whose mode and hooks would be touched
        self.__dict__["_record"] = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.__dict__["_record"].append((args, kwargs))
        return hidden
