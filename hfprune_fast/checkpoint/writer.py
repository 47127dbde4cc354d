"""The weights of a pruned checkpoint: what becomes of each tensor, written and read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.checkpoint.folder import INDEX, TORCH_DTYPES, WEIGHTS, read_json_object
from hfprune_fast.checkpoint.safetensors import ITEM_BYTES, SafetensorsFile, SafetensorsWriter
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.console import byte_bar
from hfprune_fast.errors import ArgumentError, NumericsError, OutputError
from hfprune_fast.models.sites import rows_of

_VERIFIED_BYTES = 16 << 20  # compared at once


class Writing:
    """The weights of one pruned checkpoint: where each tensor goes, and what becomes of it."""

    def __init__(
        self,
        source: ModelSource,
        keep: Mapping[int, Tensor],
        replace: Mapping[str, Tensor],
        shard_bytes: int | None,
        *,
        pad_to: int = 0,
    ) -> None:
        self.source, self.replace = source, replace
        self.cuts: dict[str, tuple[int, Any]] = {}  # axis and the indices that stay
        self.blocks: dict[str, int] = {}  # how often each neuron is in a tensor
        self.kept_shapes: dict[str, tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # as written, with zeros up to pad_to neurons
        for name, info in source.tensors.items():
            kept_shape = shape = info.shape
            place = source.place_of(name)
            if place is not None:
                axis, kept = place.axis, keep[place.layer].cpu()
                blocks = place.times
                self.cuts[name] = axis, rows_of(kept, shape[axis] // blocks, blocks).numpy()
                self.blocks[name] = blocks
                width = len(kept)
                kept_shape = (*shape[:axis], blocks * width, *shape[axis + 1 :])
                shape = (*shape[:axis], blocks * max(width, pad_to), *shape[axis + 1 :])
            self.kept_shapes[name], self.shapes[name] = kept_shape, shape
        for name in replace:
            if name not in self.shapes:
                raise ArgumentError(f"replace names {name}, which the checkpoint does not have")
        self.shards = self._shards(shard_bytes)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * ITEM_BYTES[self.source.tensors[name].dtype]

    def _shards(self, max_bytes: int | None) -> dict[str, list[str]]:
        """Return the tensors of each file: the source's, or as many as fit into max_bytes."""
        shards: dict[str, list[str]] = {}
        if max_bytes is None:
            for name, info in self.source.tensors.items():
                shards.setdefault(info.file, []).append(name)
            return shards
        groups: list[list[str]] = [[]]
        filled = 0
        for name in self.source.tensors:
            if groups[-1] and filled + self.nbytes(name) > max_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += self.nbytes(name)
        if len(groups) == 1:
            return {WEIGHTS: groups[0]}
        return {
            f"model-{i:05}-of-{len(groups):05}.safetensors": group
            for i, group in enumerate(groups, start=1)
        }

    def write(self, partial: Path, progress: bool) -> None:
        """Write all shards and their index, a tensor a thread."""
        total = sum(map(self.nbytes, self.shapes))
        metadata = {
            key: value
            for file in reversed(self.source.shards.values())
            for key, value in (file.metadata or {"format": "pt"}).items()
        }
        threads = max(2, torch.get_num_threads())
        with (
            byte_bar("writing", total, progress) as on_progress,
            ThreadPoolExecutor(threads, thread_name_prefix="hfprune-write") as pool,
        ):
            for file, names in self.shards.items():
                known = self.source.shards.get(file)
                with SafetensorsWriter(
                    partial / file,
                    metadata if known is None else known.metadata or {"format": "pt"},
                    [(n, self.source.tensors[n].dtype, self.shapes[n]) for n in names],
                ) as writer:
                    tasks = {pool.submit(self._write_tensor, writer, n): n for n in names}
                    try:
                        for task in as_completed(tasks):
                            task.result()
                            on_progress(self.nbytes(tasks[task]))
                    except BaseException:
                        pool.shutdown(cancel_futures=True)  # before the file is closed
                        raise
        if list(self.shards) != [WEIGHTS]:
            self._write_index(partial, total)

    def _write_tensor(self, writer: SafetensorsWriter, name: str) -> None:
        built = self._build(name)
        if built is not None:
            finite = writer.write(name, built)
        else:
            axis, kept = self.cuts.get(name, (0, None))
            finite = writer.write(name, self._stored(name), axis=axis, keep=kept)
            self.source.release(name)
        if not finite:
            raise NumericsError(f"{self.source.folder}: tensor {name} holds NaN or inf")

    def _stored(self, name: str) -> Any:
        """Return the bits of a tensor of the source, in the pages of its file."""
        info = self.source.tensors[name]
        bits = np.frombuffer(self.source.data(name), f"u{ITEM_BYTES[info.dtype]}")
        return bits.reshape(info.shape)

    def _build(self, name: str) -> Any:
        """Return the bits of a tensor that is replaced or padded; None if the source has them."""
        shape = self.kept_shapes[name]
        if name not in self.replace and self.shapes[name] == shape:
            return None
        if name in self.replace:
            tensor, dtype = self.replace[name], TORCH_DTYPES[self.source.tensors[name].dtype]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ArgumentError(
                    f"replace[{name}] must be {shape} {dtype}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            cut = flat.numpy().view(f"u{dtype.itemsize}").reshape(shape)
        else:
            axis, kept = self.cuts[name]
            cut = self._stored(name).take(kept, axis)
            self.source.release(name)
        if self.shapes[name] == shape:
            return cut
        padded, axis = np.zeros(self.shapes[name], cut.dtype), self.cuts[name][0]
        blocks = self.blocks[name]
        for from_block, to_block in zip(
            np.split(cut, blocks, axis), np.split(padded, blocks, axis), strict=True
        ):
            to_block[tuple(slice(size) for size in from_block.shape)] = from_block  # a view
        return padded

    def _write_index(self, partial: Path, total_bytes: int) -> None:
        old = self.source.folder / INDEX
        metadata = read_json_object(old).get("metadata") if old.exists() else None
        metadata = metadata if isinstance(metadata, dict) else {}
        metadata = {k: v for k, v in metadata.items() if not isinstance(v, dict | list)}
        metadata["total_size"] = total_bytes
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(shape) for shape in self.shapes.values())
        weight_map = {name: file for file, names in self.shards.items() for name in names}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(partial / INDEX, index)

    def verify(self, partial: Path, progress: bool) -> None:
        """Read back what was written, from the disk where the system allows, and compare it.

        It is compared by numpy, which shares no code with what wrote it.
        """
        total = sum(map(self.nbytes, self.shapes))
        with byte_bar("verifying", total, progress) as on_progress:
            for file, names in self.shards.items():
                _forget_cached(partial / file)
                written = SafetensorsFile(partial / file)
                if list(written.tensors) != names:
                    raise OutputError(f"{partial / file} reads back with other tensors")
                for name in names:
                    self._verify_tensor(written, name)
                    on_progress(self.nbytes(name))

    def _verify_tensor(self, written: SafetensorsFile, name: str) -> None:
        dtype, shape = self.source.tensors[name].dtype, self.shapes[name]
        same = written.tensors[name][:2] == (dtype, shape)
        if same:
            found = np.frombuffer(written.data(name), f"u{ITEM_BYTES[dtype]}").reshape(shape)
            axis, kept = self.cuts.get(name, (0, None))
            expected = self._build(name)
            if expected is None:
                expected = self._stored(name)
            else:
                kept = None
            same = _equal(found, expected, axis, kept)
        if not same:
            raise OutputError(f"tensor {name} of {written.path} does not read back as written")
        written.release(name)
        self.source.release(name)


def _equal(found: Any, expected: Any, axis: int, kept: Any) -> bool:
    """Return whether an array is what `kept` leaves of another, in blocks of _VERIFIED_BYTES."""
    found, expected = np.atleast_1d(found), np.atleast_1d(expected)
    step = max(1, _VERIFIED_BYTES // max(1, expected[:1].nbytes))
    for row in range(0, len(found), step):
        part = slice(row, row + step)
        block = expected[part] if kept is None or axis == 1 else expected[kept[part]]
        if kept is not None and axis == 1:
            block = block[:, kept]
        if not np.array_equal(block, found[part]):
            return False
    return True


def _forget_cached(path: Path) -> None:
    """Sync a file and drop it from the page cache, so that the next read is of the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    """Write a JSON file as `json_text` makes it."""
    path.write_text(json_text(value, indent), encoding="utf-8")


def json_text(value: dict[str, Any], indent: int | None = 2) -> str:
    """Return JSON in ASCII: control characters of names and metadata are escaped."""
    text = json.dumps(value, indent=indent).replace("\x7f", "\\u007f")
    return f"{text}\n"
