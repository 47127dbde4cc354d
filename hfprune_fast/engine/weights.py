"""Where the weights of a streamed model come from.

On a CPU with offload "disk" weights are used in place, in the mapped file: the next layer's pages
are read ahead and a layer's pages are released after use. In all other cases two buffers of the
largest layer's size take turns: a thread fills one, from host memory or from the file, while the
layer in the other runs. On a GPU the copy has its own stream.

A unit is what is fetched at a time: a layer, or the final norm and the head. A weight is named by
the checkpoint's tensors that, side by side, are it: one for nearly all, many for experts.
"""

from __future__ import annotations

import math
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.checkpoint.folder import TORCH_DTYPES
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.checkpoint.stored_names import swapped

ALIGN_BYTES = 64  # a cache line


Weight = tuple[str, ...]


class CheckpointTensors:
    """The tensors of a checkpoint, mapped into memory; `tensor` returns them in `dtype`."""

    def __init__(self, source: ModelSource, dtype: torch.dtype) -> None:
        self._source, self.dtype = source, dtype

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Return the shape of a weight; of several tensors, their number comes first."""
        shape = self._source.tensors[weight[0]].shape
        if weight[0] in self._source.across:
            shape = swapped(shape)
        return shape if len(weight) == 1 else (len(weight), *shape)

    def stored(self, name: str, *, read_ahead: bool = True) -> Tensor:
        """Return a tensor in the file's pages, as the model has its axes; it is only read."""
        info = self._source.tensors[name]
        data = self._source.data(name, prefetch=read_ahead)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            tensor = torch.frombuffer(data, dtype=torch.uint8)
        stored = TORCH_DTYPES[info.dtype]
        if self._begin(name) % stored.itemsize:
            tensor = tensor.clone()
        tensor = tensor.view(stored).view(info.shape)
        return tensor.mT if name in self._source.across else tensor

    def tensor(self, weight: Weight) -> Tensor:
        """Return a weight in `dtype`; one tensor is in the file's pages where possible."""
        if len(weight) == 1:
            return self.stored(weight[0]).to(self.dtype).contiguous()
        merged = torch.empty(self.shape(weight), dtype=self.dtype)
        self.copy(weight, merged)
        return merged

    def copy(self, weight: Weight, out: Tensor) -> None:
        """Copy a weight, and let the system drop the pages of each of its tensors."""
        for name, part in zip(weight, out if len(weight) > 1 else [out], strict=True):
            part.copy_(self.stored(name))
            self._source.release(name)

    def offset_in_line(self, weight: Weight) -> int:
        """Return where in a cache line the data of `tensor` begin, in elements."""
        if len(weight) > 1 or weight[0] in self._source.across:  # which are copied
            return 0
        begin = self._begin(weight[0])
        is_stored = TORCH_DTYPES[self._source.tensors[weight[0]].dtype] == self.dtype
        in_pages = is_stored and begin % self.dtype.itemsize == 0
        return begin % ALIGN_BYTES // self.dtype.itemsize if in_pages else 0

    def _begin(self, name: str) -> int:
        begin: int = self._source.shards[self._source.tensors[name].file].tensors[name][2]
        return begin

    def prefetch(self, weight: Weight) -> None:
        """Start to read a weight's pages."""
        for name in weight:
            self._source.data(name)

    def release(self, weight: Weight) -> None:
        """Let the system drop a weight's pages."""
        for name in weight:
            self._source.release(name)


class MappedWeights:
    """Weights in the file's own pages; those of several tensors are copied each time."""

    def __init__(self, tensors: CheckpointTensors, units: list[list[Weight]]) -> None:
        self._tensors, self._units = tensors, units

    def fetch(self, unit: int, then: int) -> dict[Weight, Tensor]:
        """Return the weights of a unit, and read the next unit's ahead."""
        fetched = {weight: self._tensors.tensor(weight) for weight in self._units[unit]}
        for weight in self._units[then]:
            self._tensors.prefetch(weight)
        return fetched

    def release(self, unit: int) -> None:
        for weight in self._units[unit]:
            self._tensors.release(weight)

    def close(self) -> None:
        """Do nothing: the file stays mapped."""


@dataclass
class _Slot:
    """A buffer on the device, and the unit that is in it or being copied into it."""

    flat: Tensor
    staging: Tensor | None = None  # pinned memory between the file and a GPU
    unit: int | None = None
    filling: Future[None] | None = None
    filled: torch.cuda.Event | None = None  # on the stream that copies
    free: torch.cuda.Event | None = None  # on the stream that computes


class BufferedWeights:
    """Weights in two buffers on the device, filled in turns by a thread.

    Args:
        units: the weights of each.
        keep: keep every unit in host memory after its first read.
    """

    def __init__(
        self,
        tensors: CheckpointTensors,
        units: list[list[Weight]],
        device: torch.device,
        keep: bool,
    ) -> None:
        self._tensors, self._device, self._keep = tensors, device, keep
        self._cuda = device.type == "cuda"
        # Of each unit, where in its buffer each weight begins; in elements.
        self._offsets: list[dict[Weight, int]] = []
        self._sizes: list[int] = []
        step = ALIGN_BYTES // tensors.dtype.itemsize
        for weights in units:
            end, offsets = 0, {}
            for weight in weights:
                offsets[weight] = end + (0 if self._cuda else tensors.offset_in_line(weight))
                end = -(-(offsets[weight] + math.prod(tensors.shape(weight))) // step) * step
            self._offsets.append(offsets)
            self._sizes.append(end)
        self._host: dict[int, Tensor] = {}
        self._slots: list[_Slot] = []
        self._in_use: _Slot | None = None
        self._threads = ThreadPoolExecutor(1, "hfprune-weights")
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def fetch(self, unit: int, then: int) -> dict[Weight, Tensor]:
        """Return the weights of a unit, and begin to fill the other buffer with the next.

        They are valid until the next fetch.
        """
        if not self._slots:
            self._slots = [self._new_slot(), self._new_slot()]
        slot = self._slot_for(unit)
        assert slot.filling is not None
        try:
            slot.filling.result()
        except BaseException:
            slot.unit = None
            raise
        self._in_use = slot
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        self._slot_for(then)
        return self._views(slot.flat, unit)

    def release(self, unit: int) -> None:
        if self._cuda and self._in_use is not None:
            self._in_use.free = torch.cuda.current_stream(self._device).record_event()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        if self._stream is not None:
            # A copy that nothing will use may still run. The allocator reuses the buffers'
            # memory as soon as it is free and does not know this stream.
            self._stream.synchronize()
        self._slots.clear()
        self._host.clear()

    def _new_slot(self) -> _Slot:
        size = max(self._sizes)
        slot = _Slot(torch.empty(size, dtype=self._tensors.dtype, device=self._device))
        if self._cuda:
            slot.free = torch.cuda.current_stream(self._device).record_event()
            if not self._keep:
                slot.staging = torch.empty(size, dtype=self._tensors.dtype, pin_memory=True)
        return slot

    def _slot_for(self, unit: int) -> _Slot:
        """Return the slot that has a unit, or start to fill the one that is not in use."""
        for slot in self._slots:
            if slot.unit == unit:
                return slot
        slot = next(slot for slot in self._slots if slot is not self._in_use)
        slot.unit = unit
        slot.filling = self._threads.submit(self._fill, slot, unit)
        return slot

    def _fill(self, slot: _Slot, unit: int) -> None:
        size = self._sizes[unit]
        if self._stream is None:
            slot.flat[:size].copy_(self._on_host(unit, None))
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if slot.filled is not None:
                slot.filled.synchronize()  # the last copy out of the staging memory has ended
            on_host = self._on_host(unit, slot.staging)
            assert slot.free is not None
            self._stream.wait_event(slot.free)
            slot.flat[:size].copy_(on_host, non_blocking=True)
            slot.filled = self._stream.record_event()

    def _on_host(self, unit: int, staging: Tensor | None) -> Tensor:
        """Return a unit's weights in one flat tensor in host memory."""
        if unit in self._host:
            return self._host[unit]
        size = self._sizes[unit]
        if staging is None:
            flat = torch.empty(size, dtype=self._tensors.dtype, pin_memory=self._cuda)
        else:
            flat = staging[:size]
        for weight in self._offsets[unit]:  # all before the first copy, so that the disk stays busy
            self._tensors.prefetch(weight)
        for weight, view in self._views(flat, unit).items():
            self._tensors.copy(weight, view)
        if self._keep:
            self._host[unit] = flat
        return flat

    def _views(self, flat: Tensor, unit: int) -> dict[Weight, Tensor]:
        shapes = {weight: self._tensors.shape(weight) for weight in self._offsets[unit]}
        return {
            weight: flat[begin : begin + math.prod(shapes[weight])].view(shapes[weight])
            for weight, begin in self._offsets[unit].items()
        }
