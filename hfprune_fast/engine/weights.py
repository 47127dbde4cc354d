"""Where the weights of a streamed model come from.

On a CPU with offload "disk" weights are used in place, in the mapped file: the next layer's pages
are read ahead and a layer's pages are released after use. In all other cases two buffers of the
largest layer's size take turns: a thread fills one, from host memory or from the file, while the
layer in the other runs. On a GPU the copy has its own stream.

A unit is what is fetched at a time: a layer, or the final norm and the head.
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

ALIGN_BYTES = 64  # a cache line


class CheckpointTensors:
    """The tensors of a checkpoint, mapped into memory; `tensor` returns them in `dtype`."""

    def __init__(self, source: ModelSource, dtype: torch.dtype) -> None:
        self._source, self.dtype = source, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.tensors[name].shape

    def stored(self, name: str, *, read_ahead: bool = True) -> Tensor:
        """Return a tensor as it is stored, in the file's pages; it must not be written to."""
        info = self._source.tensors[name]
        data = self._source.data(name, prefetch=read_ahead)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            tensor = torch.frombuffer(data, dtype=torch.uint8)
        stored = TORCH_DTYPES[info.dtype]
        if self._begin(name) % stored.itemsize:
            tensor = tensor.clone()
        return tensor.view(stored).view(info.shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in `dtype`, in the file's pages where possible."""
        return self.stored(name).to(self.dtype)

    def offset_in_line(self, name: str) -> int:
        """Return where in a cache line the data of `tensor` begin, in elements."""
        begin = self._begin(name)
        is_stored = TORCH_DTYPES[self._source.tensors[name].dtype] == self.dtype
        in_pages = is_stored and begin % self.dtype.itemsize == 0
        return begin % ALIGN_BYTES // self.dtype.itemsize if in_pages else 0

    def _begin(self, name: str) -> int:
        begin: int = self._source.shards[self._source.tensors[name].file].tensors[name][2]
        return begin

    def prefetch(self, name: str) -> None:
        """Start to read a tensor's pages."""
        self._source.data(name)

    def release(self, name: str) -> None:
        """Let the system drop a tensor's pages."""
        self._source.release(name)


class MappedWeights:
    """Weights in the file's own pages."""

    def __init__(self, tensors: CheckpointTensors, units: list[list[str]]) -> None:
        self._tensors, self._units = tensors, units

    def fetch(self, unit: int, then: int) -> dict[str, Tensor]:
        """Return the tensors of a unit by name, and read the next unit's ahead."""
        fetched = {name: self._tensors.tensor(name) for name in self._units[unit]}
        for name in self._units[then]:
            self._tensors.prefetch(name)
        return fetched

    def release(self, unit: int) -> None:
        for name in self._units[unit]:
            self._tensors.release(name)

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
        units: the names of each unit's tensors.
        keep: keep every unit in host memory after its first read.
    """

    def __init__(
        self, tensors: CheckpointTensors, units: list[list[str]], device: torch.device, keep: bool
    ) -> None:
        self._tensors, self._device, self._keep = tensors, device, keep
        self._cuda = device.type == "cuda"
        # Of each unit, where in its buffer each tensor begins; in elements.
        self._offsets: list[dict[str, int]] = []
        self._sizes: list[int] = []
        step = ALIGN_BYTES // tensors.dtype.itemsize
        for names in units:
            end, offsets = 0, {}
            for name in names:
                offsets[name] = end + (0 if self._cuda else tensors.offset_in_line(name))
                end = -(-(offsets[name] + math.prod(tensors.shape(name))) // step) * step
            self._offsets.append(offsets)
            self._sizes.append(end)
        self._host: dict[int, Tensor] = {}
        self._slots: list[_Slot] = []
        self._in_use: _Slot | None = None
        self._threads = ThreadPoolExecutor(1, "hfprune-weights")
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def fetch(self, unit: int, then: int) -> dict[str, Tensor]:
        """Return the tensors of a unit by name, and begin to fill the other buffer with the next.

        The tensors are valid until the next fetch.
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
        """Return a unit's tensors in one flat tensor in host memory."""
        if unit in self._host:
            return self._host[unit]
        size = self._sizes[unit]
        if staging is None:
            flat = torch.empty(size, dtype=self._tensors.dtype, pin_memory=self._cuda)
        else:
            flat = staging[:size]
        for name in self._offsets[unit]:  # all before the first copy, so that the disk stays busy
            self._tensors.prefetch(name)
        for name, view in self._views(flat, unit).items():
            view.copy_(self._tensors.stored(name))
            self._tensors.release(name)
        if self._keep:
            self._host[unit] = flat
        return flat

    def _views(self, flat: Tensor, unit: int) -> dict[str, Tensor]:
        shapes = {name: self._tensors.shape(name) for name in self._offsets[unit]}
        return {
            name: flat[begin : begin + math.prod(shapes[name])].view(shapes[name])
            for name, begin in self._offsets[unit].items()
        }
