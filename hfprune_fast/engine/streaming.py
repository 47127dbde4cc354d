"""A model whose weights do not fit: each layer's are brought when it is to run.

On a CPU with offload "disk" weights are used where they are, in the mapped file: the next layer's
pages are asked for ahead and a layer's are given back after use. Everywhere else two buffers of the
largest layer's size take turns: a thread fills one, from host memory or from the file, while the
layer in the other runs; on a GPU the copy has a stream of its own.

On a CPU a product's last bits can depend on where in a cache line its weight begins, so a weight
begins there wherever it is put: as in the file, or, where it had to be copied, at the start.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint.loading import Blueprint, build, frozen, put
from hfprune_fast.checkpoint.source import TORCH_DTYPES, Checkpoint
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import Linear, ResidentModel, check_finite

_ALIGN_BYTES = 64


def running(blueprint: Blueprint, offload: str) -> ResidentModel:
    """Return a blueprint's model, its weights resident ("none") or streamed ("cpu", "disk")."""
    if offload == "none":
        return ResidentModel(build(blueprint))
    return StreamedModel(blueprint, offload)


class StreamedModel(ResidentModel):
    """The model of a blueprint, of which a layer or two are in memory at a time.

    Args:
        blueprint: what to run, in which dtype and where.
        offload: "disk" reads a layer's weights from the checkpoint each time; "cpu" keeps all of
            them in host memory, pinned for a GPU, which reads them faster.

    Layer number L is the final norm and the head. Embeddings are looked up in the file. Errors are
    those of `ResidentModel`; a weight with NaN or inf is found when it is first brought.
    """

    def __init__(self, blueprint: Blueprint, offload: str) -> None:
        super().__init__(blueprint.model)
        self.device, self.dtype = blueprint.device, blueprint.dtype
        for module in self.model.modules():  # rotary tables and the like, which no file holds
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        names, family = blueprint.names, blueprint.checkpoint.family
        below = f"{family.decoder}."
        starts: list[tuple[str, ...]] = [
            (f"{below}{family.layers}.{layer}.",) for layer in range(len(self.parts.layers))
        ]
        starts.append((f"{below}{family.norm}.", f"{family.head}."))
        self._names = [
            {ours: theirs for ours, theirs in names.items() if ours.startswith(start)}
            for start in starts
        ]
        self._embedding = names[f"{below}{family.embedding}.weight"]
        self._checked: set[str] = set()
        self._file = _File(blueprint.checkpoint, self.dtype)
        tensors = [sorted(set(unit.values())) for unit in self._names]
        self._source: _Mapped | _Buffered
        if offload == "disk" and self.device.type == "cpu":
            self._source = _Mapped(self._file, tensors)
        else:
            self._source = _Buffered(self._file, tensors, self.device, offload == "cpu")

    def _check(self) -> None:
        """Weights are checked as they go by."""

    def __exit__(self, *error: object) -> None:
        self._source.close()
        super().__exit__(*error)

    def embed(self, ids: Tensor) -> Tensor:
        table = self._file.stored(self._embedding, ahead=False)  # a few rows of it are looked at
        self._check_once(self._embedding, table)
        embeddings: Tensor = torch.func.functional_call(
            self.parts.embedding, {"weight": table}, (ids,)
        )
        self._file.done_with(self._embedding)
        return embeddings.to(self.device, self.dtype)

    @contextmanager
    def weights_of(self, layer: int, then: int) -> Iterator[None]:
        tensors = self._source.bring(layer, then)
        names = self._names[layer]
        absent = {ours: self.model.get_parameter(ours) for ours in names}
        try:
            for ours, theirs in names.items():
                self._check_once(theirs, tensors[theirs])
                put(self.model, ours, frozen(tensors[theirs]))
            yield
        finally:
            for ours, nothing in absent.items():
                put(self.model, ours, nothing)
            del tensors
            self._source.give_back(layer)

    def head(self) -> Linear:
        with self.weights_of(len(self.parts.layers), then=0):
            head = super().head()
            if isinstance(self._source, _Mapped):
                return head
            bias = None if head.bias is None else head.bias.clone()
            return Linear(_copy_in_line(head.weight), bias)

    def final_hidden(
        self, batches: Sequence[MicroBatch], done: Callable[[float], object] = lambda tokens: None
    ) -> Iterator[Tensor]:
        """Yield what `ResidentModel.final_hidden` does; all of it is made first, layer by layer."""
        yield from self._final_hidden(batches, done)

    def _hold(self, hidden: Tensor) -> Tensor:
        return hidden.cpu()

    def _check_once(self, name: str, tensor: Tensor) -> None:
        if name not in self._checked:
            check_finite(name, tensor)
            self._checked.add(name)


def _copy_in_line(tensor: Tensor) -> Tensor:
    """Return a copy that begins where in a cache line the tensor does."""
    shift = tensor.data_ptr() % _ALIGN_BYTES // tensor.itemsize
    room = tensor.new_empty(shift + tensor.numel())
    return room[shift:].view_as(tensor).copy_(tensor)


class _File:
    """Tensors of a checkpoint, mapped."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self.dtype = checkpoint, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.tensors[name].shape

    def stored(self, name: str, *, ahead: bool = True) -> Tensor:
        """Return a tensor as it is stored, in the file's pages; it must not be written to."""
        info = self._checkpoint.tensors[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            tensor = torch.frombuffer(
                self._checkpoint.data(name, prefetch=ahead), dtype=torch.uint8
            )
        stored = TORCH_DTYPES[info.dtype]
        if self._begin(name) % stored.itemsize:
            tensor = tensor.clone()
        return tensor.view(stored).view(info.shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in the dtype to run in, in the file's pages where that can be."""
        return self.stored(name).to(self.dtype)

    def in_line(self, name: str) -> int:
        """Return where in a cache line the data of `tensor` begin, in elements."""
        begin = self._begin(name)
        is_stored = TORCH_DTYPES[self._checkpoint.tensors[name].dtype] == self.dtype
        in_pages = is_stored and begin % self.dtype.itemsize == 0
        return begin % _ALIGN_BYTES // self.dtype.itemsize if in_pages else 0

    def _begin(self, name: str) -> int:
        begin: int = self._checkpoint.files[self._checkpoint.tensors[name].file].tensors[name][2]
        return begin

    def ask_for(self, name: str) -> None:
        self._checkpoint.data(name)  # which has the pages read ahead

    def done_with(self, name: str) -> None:
        self._checkpoint.files[self._checkpoint.tensors[name].file].release(name)


class _Mapped:
    """Weights in the file's own pages."""

    def __init__(self, file: _File, tensors: list[list[str]]) -> None:
        self._file, self._tensors = file, tensors

    def bring(self, layer: int, then: int) -> dict[str, Tensor]:
        brought = {name: self._file.tensor(name) for name in self._tensors[layer]}
        for name in self._tensors[then]:
            self._file.ask_for(name)
        return brought

    def give_back(self, layer: int) -> None:
        for name in self._tensors[layer]:
            self._file.done_with(name)

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class _Slot:
    """A buffer on the device, and what is in it or on its way there."""

    flat: Tensor
    staging: Tensor | None = None  # pinned memory on the way from the file to a GPU
    layer: int | None = None
    filling: Future[None] | None = None
    filled: torch.cuda.Event | None = None  # on the copying stream
    free: torch.cuda.Event | None = None  # on the stream that computes


class _Buffered:
    """Weights in two buffers on the device, filled in turns by a thread."""

    def __init__(
        self, file: _File, tensors: list[list[str]], device: torch.device, keep: bool
    ) -> None:
        self._file, self._device, self._keep = file, device, keep
        self._cuda = device.type == "cuda"
        # Of each layer, where in its buffer each tensor begins; in elements.
        self._places: list[dict[str, int]] = []
        self._sizes: list[int] = []
        step = _ALIGN_BYTES // file.dtype.itemsize
        for names in tensors:
            end, places = 0, {}
            for name in names:
                places[name] = end + (0 if self._cuda else file.in_line(name))
                end = -(-(places[name] + math.prod(file.shape(name))) // step) * step
            self._places.append(places)
            self._sizes.append(end)
        self._host: dict[int, Tensor] = {}
        self._slots: list[_Slot] = []
        self._in_use: _Slot | None = None
        self._threads = ThreadPoolExecutor(1, "hfprune-weights")
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def bring(self, layer: int, then: int) -> dict[str, Tensor]:
        if not self._slots:
            self._slots = [self._new_slot(), self._new_slot()]
        slot = self._begin(layer)
        assert slot.filling is not None
        try:
            slot.filling.result()
        except BaseException:
            slot.layer = None
            raise
        self._in_use = slot
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        self._begin(then)
        return self._views(slot.flat, layer)

    def give_back(self, layer: int) -> None:
        if self._cuda and self._in_use is not None:
            self._in_use.free = torch.cuda.current_stream(self._device).record_event()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._stream is not None:
            # The copy of a layer that nobody asked for may still run; the buffers' memory is
            # given to others as soon as it is free, and they know nothing of this stream.
            self._stream.synchronize()
        self._slots.clear()
        self._host.clear()

    def _new_slot(self) -> _Slot:
        size = max(self._sizes)
        slot = _Slot(torch.empty(size, dtype=self._file.dtype, device=self._device))
        if self._cuda:
            slot.free = torch.cuda.current_stream(self._device).record_event()
            if not self._keep:
                slot.staging = torch.empty(size, dtype=self._file.dtype, pin_memory=True)
        return slot

    def _begin(self, layer: int) -> _Slot:
        """Return the slot that has a layer, or that now begins to be filled with it."""
        for slot in self._slots:
            if slot.layer == layer:
                return slot
        slot = next(slot for slot in self._slots if slot is not self._in_use)
        slot.layer = layer
        slot.filling = self._threads.submit(self._fill, slot, layer)
        return slot

    def _fill(self, slot: _Slot, layer: int) -> None:
        size = self._sizes[layer]
        if self._stream is None:
            slot.flat[:size].copy_(self._on_host(layer, None))
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if slot.filled is not None:
                slot.filled.synchronize()  # the last copy out of its staging memory is through
            on_host = self._on_host(layer, slot.staging)
            assert slot.free is not None
            self._stream.wait_event(slot.free)
            slot.flat[:size].copy_(on_host, non_blocking=True)
            slot.filled = self._stream.record_event()

    def _on_host(self, layer: int, staging: Tensor | None) -> Tensor:
        """Return a layer's tensors in one flat tensor in host memory."""
        if layer in self._host:
            return self._host[layer]
        size = self._sizes[layer]
        if staging is None:
            flat = torch.empty(size, dtype=self._file.dtype, pin_memory=self._cuda)
        else:
            flat = staging[:size]
        for name in self._places[layer]:  # all before the first, so that the disk has enough to do
            self._file.ask_for(name)
        for name, view in self._views(flat, layer).items():
            view.copy_(self._file.stored(name))
            self._file.done_with(name)
        if self._keep:
            self._host[layer] = flat
        return flat

    def _views(self, flat: Tensor, layer: int) -> dict[str, Tensor]:
        places: dict[str, Any] = self._places[layer]
        shapes = {name: self._file.shape(name) for name in places}
        return {
            name: flat[begin : begin + math.prod(shapes[name])].view(shapes[name])
            for name, begin in places.items()
        }
