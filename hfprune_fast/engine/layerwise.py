"""Run a loaded model one layer at a time; it is checked first and restored at the end.

A family's own forward does the set-up (embedding, masks, position embeddings): it runs once per
micro-batch with stubs in place of the layers, which record how each layer is called. Then
`for_each_layer` runs the layers one by one, each called as recorded, so that only the layer that
runs needs its weights in memory. `ResidentModel` keeps all there; `StreamedModel` fetches them.

This is right where a layer's output is all that the next one is given, and where the other
arguments do not depend on the tokens. Both are checked, so a family that passes on more is refused.

Sequences of a micro-batch are padded on the right. Under causal attention no token sees a later
one, so padding needs no attention mask; it is only left out of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.expert_hooks import known_gate
from hfprune_fast.engine.fused import fused_modules
from hfprune_fast.engine.layer_calls import NOT_IN_A_ROW, Calls, recorded_calls, same_calls
from hfprune_fast.engine.mlp_hooks import known_activation
from hfprune_fast.errors import ArgumentError, NumericsError, UnsupportedModelError
from hfprune_fast.models.sites import Logits, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnProgress = Callable[[float], object]  # takes the tokens processed since the last call

_CACHED_SHAPES = 16  # micro-batch shapes whose recorded calls (masks, position embeddings) are kept


def no_progress(tokens: float) -> None:
    """Default progress callback: does nothing."""


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, pinned for a GPU's, which nothing here waits for.

    Later copies to the GPU do: its stream orders them. The host must not read it before.
    """
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return pinned.copy_(tensor, non_blocking=True)


@contextmanager
def own_modes() -> Iterator[None]:
    """Inside, or in a function decorated with it, the caller's autocast and inference mode are off.

    Autocast would round what is summed, and tensors of inference mode cannot be differentiated.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericsError, with the tensor's name, if it holds NaN or inf."""
    if tensor.numel() == 0:
        return
    # The minimum and maximum reveal NaN and inf without a mask as large as the tensor.
    if not bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all()):
        raise NumericsError(f"tensor {name} holds NaN or inf; the checkpoint is damaged")


@dataclass(frozen=True)
class Head:
    """A model's head, which outlives the model and returns its logits, scaled and capped."""

    weight: Tensor  # (V, D)
    bias: Tensor | None
    logits: Logits

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.weight.device)
        return self.logits(nn.functional.linear(hidden, self.weight, self.bias))


class ResidentModel:
    """A loaded model that runs one layer at a time.

    Use as a context manager: inside, the model is in evaluation mode and its parameters are frozen;
    both are restored on exit. On a GPU its plain norms and rotary embeddings are fused meanwhile
    (`engine.fused`). `head_unit` numbers the weights of the final norm and the head.
    `streams_on_device`: see `engine.plan.Plan`. `backend`: of the kernels, as they take it.

    Raises:
        ArgumentError: the model is spread over several devices.
        NumericsError: a parameter, which is named, holds NaN or inf.
        UnsupportedModelError: the model has no known gated MLP.
    """

    streams_on_device = False
    backend: str | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = parts_of(model)
        self.device, self.dtype = self.parts.head.weight.device, self.parts.head.weight.dtype
        self._calls: dict[tuple[int, ...], Calls] = {}
        self._compared = False  # whether the calls of two micro-batches of one shape have been
        self._in_tuples = False  # whether the decoder takes a layer's output out of a tuple
        self._own_experts: dict[int, str | None] = {}  # how transformers runs them, by config
        self._activations: dict[int, tuple[str | None, str | None]] = {}
        self._check()

    @property
    def vocab(self) -> int:
        return self.parts.head.weight.shape[0]

    @property
    def head_unit(self) -> int:
        return len(self.parts.layers)

    def kept(self, stream: Tensor) -> Tensor:
        """Return what is kept of a residual stream until the next layer runs.

        It stays on the device or goes to host memory, see `on_host`.
        """
        return stream if self.streams_on_device or not stream.is_cuda else on_host(stream)

    def _check(self) -> None:
        devices = {str(parameter.device) for parameter in self.model.parameters()}
        if len(devices) != 1 or "meta" in devices:
            raise ArgumentError(
                f"the model must be on one device, got {', '.join(sorted(devices))}"
            )
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                check_finite(name, tensor)

    def __enter__(self) -> ResidentModel:
        self._training = {module: module.training for module in self.model.modules()}
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        grouped = all(e.can_be_grouped for e in self.parts.with_experts.values())
        self._set_experts_to(None if grouped else "eager")
        self._fused = ExitStack()
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        self._fused.enter_context(fused_modules(self.model, self.backend, like))
        return self

    def __exit__(self, *_: object) -> None:
        self._fused.close()
        self._calls.clear()
        for module, mode in self._training.items():
            module.training = mode
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._set_experts_to(None)

    def _set_experts_to(self, implementation: str | None) -> None:
        """Choose how transformers runs experts; None is its own choice."""
        configs = {id(c): c for c in (e.module.config for e in self.parts.with_experts.values())}
        for config in configs.values():
            own = self._own_experts.setdefault(id(config), config._experts_implementation)
            config._experts_implementation = implementation or own

    def embed(self, ids: Tensor) -> Tensor:
        """Return (B, T, D) embeddings of token ids, on the model's device."""
        embeddings: Tensor = self.parts.embedding(ids.to(self.device))
        return embeddings

    @contextmanager
    def weights_of(self, unit: int, then: int) -> Iterator[None]:
        """Keep the weights of a unit, a layer or `head_unit`, in place; prefetch `then`'s."""
        yield

    def begin(self, batch: MicroBatch) -> Tensor:
        """Return the first layer's input (B, T, D), and record how the layers are called.

        Raises:
            UnsupportedModelError: the decoder does more between its layers than to call each with
                the output of the one before, or calls them with what depends on the tokens.
        """
        calls, first = self._record(batch, self.embed(batch.ids))
        if len(self._calls) >= _CACHED_SHAPES:
            self._calls.clear()
        # The calls depend only on the shape, so micro-batches of one shape share them.
        known = self._calls.setdefault(tuple(batch.ids.shape), calls)
        if known is not calls and not self._compared:
            self._compared = True
            if not same_calls(known, calls):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} calls its layers with what depends on the "
                    "tokens, so they cannot be run alone"
                )
        return first

    def _record(self, batch: MicroBatch, embeddings: Tensor) -> tuple[Calls, Tensor]:
        ids = batch.ids.to(self.device)
        try:
            return recorded_calls(self.parts, ids, embeddings, in_tuples=self._in_tuples)
        except NOT_IN_A_ROW as error:
            if not self._in_tuples:
                self._in_tuples = True
                return self._record(batch, embeddings)
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run its layers one after the other, each on "
                "the output of the one before, so they cannot be run alone"
            ) from error

    def run(self, layer: int, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Return a layer's output (B, T, D); its weights must be in place."""
        shape = tuple(batch.ids.shape)
        if shape not in self._calls:
            self.begin(batch)
        args, kwargs = self._calls[shape][layer]
        output: Tensor | tuple[Tensor, ...] = self.parts.layers[layer](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def activations(self, layer: int) -> tuple[str | None, str | None]:
        """Return the activations of a layer's MLP and of its experts.

        None stands for what computes no plain formula, or is not there.
        """
        if layer not in self._activations:
            mlp, experts = self.parts.mlps[layer], self.parts.experts[layer]
            self._activations[layer] = (
                None if mlp is None else known_activation(mlp),
                None if experts is None else known_gate(experts),
            )
        return self._activations[layer]

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the head's input of a residual stream after the last layer, (B, T, D)."""
        normed: Tensor = self.parts.norm(hidden.to(self.device))
        return normed

    def head(self) -> Head:
        """Return the head; it stays usable after other layers have run."""
        head = self.parts.head
        return Head(head.weight, head.bias, self.parts.logits)

    def final_hidden(
        self, batches: Sequence[MicroBatch], on_progress: OnProgress = no_progress
    ) -> Iterator[Tensor]:
        """Yield the head's input (B, T, D), after the final norm, for each micro-batch."""
        for batch in batches:
            yield from self._final_hidden([batch], on_progress)

    @torch.no_grad()
    def _final_hidden(self, batches: Sequence[MicroBatch], on_progress: OnProgress) -> list[Tensor]:
        hidden = [self.begin(batch) for batch in batches]

        def forward(layer: int) -> None:
            for i, batch in each_batch(batches, on_progress, self.head_unit):
                hidden[i] = self._offload(self.run(layer, hidden[i].to(self.device), batch))

        for_each_layer(self, forward, then=self.head_unit)
        with self.weights_of(self.head_unit, then=0):
            return [self._offload(self.normed(h)) for h in hidden]

    def _offload(self, hidden: Tensor) -> Tensor:
        """Return what is kept of a micro-batch's hidden states until the next layer runs."""
        return hidden


def for_each_layer(
    model: ResidentModel, visit: Callable[[int], object], *, then: int, backward: bool = False
) -> None:
    """Call `visit(layer)` for every layer, with that layer's weights in place.

    A callback and not a generator: an error in a `for` body does not reach a generator, which would
    keep the layer's weights for as long as the error's traceback lives.

    Args:
        then: the unit (see `ResidentModel.weights_of`) that is requested after the last call.
        backward: visit the last layer first.
    """
    layers = list(range(len(model.parts.layers)))
    if backward:
        layers.reverse()
    for layer, following in zip(layers, [*layers[1:], then], strict=True):
        with model.weights_of(layer, then=following):
            visit(layer)


def each_batch(
    batches: Sequence[MicroBatch], on_progress: OnProgress, steps: float
) -> Iterator[tuple[int, MicroBatch]]:
    """Yield each micro-batch with its index, then report its tokens as 1/steps of the whole job."""
    for i, batch in enumerate(batches):
        yield i, batch
        on_progress(batch.tokens / steps)
