"""The weights of a pruned checkpoint: what becomes of each tensor, written and read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfprune_fast.checkpoint.folder import INDEX, TORCH_DTYPES, WEIGHTS, read_json_object
from hfprune_fast.checkpoint.safetensors import ITEM_BYTES, SafetensorsFile, SafetensorsWriter
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.checkpoint.written import Part, WrittenTensor, written_tensors
from hfprune_fast.console import byte_bar
from hfprune_fast.errors import ArgumentError, NumericsError, OutputError
from hfprune_fast.models.sites import SiteKey

_VERIFIED_BYTES = 16 << 20  # compared at once


class Writing:
    """The weights of one pruned checkpoint: where each tensor goes, and what becomes of it.

    Args:
        keep: as `check_keep` returns it.
        replace: {name: tensor} of what is written in place of what a cut leaves; the name is that
            of the written tensor, or of one and the number of the entry, of its first axis.
        shard_bytes: the most a file may hold; None keeps the source's files.
        pad_to: narrower MLPs are filled up with zero neurons to this width.
    """

    def __init__(
        self,
        source: ModelSource,
        keep: Mapping[SiteKey, Tensor],
        replace: Mapping[str | tuple[str, int], Tensor],
        shard_bytes: int | None,
        *,
        pad_to: int = 0,
    ) -> None:
        self.source, self.replace = source, replace
        self.tensors = {each.name: each for each in written_tensors(source, keep, pad_to)}
        for key in replace:
            name, entry = key if isinstance(key, tuple) else (key, None)
            tensor = self.tensors.get(name)
            if tensor is None:
                raise ArgumentError(f"replace names {name}, which the checkpoint does not have")
            if entry is not None and not (tensor.by_entry and entry in range(len(tensor.parts))):
                raise ArgumentError(f"replace names entry {entry} of {name}, which it has not")
        self.shards = self._shards(shard_bytes)

    def _shards(self, max_bytes: int | None) -> dict[str, list[WrittenTensor]]:
        """Return the tensors of each file: the source's, or as many as fit into max_bytes."""
        shards: dict[str, list[WrittenTensor]] = {}
        if max_bytes is None:
            for tensor in self.tensors.values():
                shards.setdefault(self.source.tensors[tensor.stored].file, []).append(tensor)
            return shards
        groups: list[list[WrittenTensor]] = [[]]
        filled = 0
        for tensor in self.tensors.values():
            if groups[-1] and filled + tensor.nbytes > max_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(tensor)
            filled += tensor.nbytes
        if len(groups) == 1:
            return {WEIGHTS: groups[0]}
        return {
            f"model-{i:05}-of-{len(groups):05}.safetensors": group
            for i, group in enumerate(groups, start=1)
        }

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, partial: Path, progress: bool) -> None:
        """Write all shards and their index, a tensor a thread."""
        metadata = {
            key: value
            for file in reversed(self.source.shards.values())
            for key, value in (file.metadata or {"format": "pt"}).items()
        }
        threads = max(2, torch.get_num_threads())
        with (
            byte_bar("writing", self.nbytes, progress) as on_progress,
            ThreadPoolExecutor(threads, thread_name_prefix="hfprune-write") as pool,
        ):
            for file, tensors in self.shards.items():
                known = self.source.shards.get(file)
                with SafetensorsWriter(
                    partial / file,
                    metadata if known is None else known.metadata or {"format": "pt"},
                    [(each.name, each.dtype, each.shape) for each in tensors],
                ) as writer:
                    tasks = {
                        pool.submit(self._write_tensor, writer, each): each for each in tensors
                    }
                    try:
                        for task in as_completed(tasks):
                            task.result()
                            on_progress(tasks[task].nbytes)
                    except BaseException:
                        pool.shutdown(cancel_futures=True)  # before the file is closed
                        raise
        if list(self.shards) != [WEIGHTS]:
            self._write_index(partial)

    def _write_tensor(self, writer: SafetensorsWriter, tensor: WrittenTensor) -> None:
        for entry, (bits, part) in self._parts(tensor):
            kept = None if part is None else part.indices()
            axis = 0 if part is None else part.axis
            if not writer.write(tensor.name, bits, axis=axis, keep=kept, entry=entry):
                raise NumericsError(f"{self.source.folder}: tensor {tensor.name} holds NaN or inf")
            self.source.release(tensor.stored)

    def _parts(self, tensor: WrittenTensor) -> Iterator[tuple[int | None, tuple[Any, Part | None]]]:
        """Yield the bits that a tensor is written from, and what stays of them: None is all.

        They come entry by entry of a tensor that is written so, with the entry's number.
        """
        if tensor.name in self.replace or tensor.padded_from is not None:
            yield None, (self._build(tensor), None)
            return
        stored = self._stored(tensor)
        for entry, part in enumerate(tensor.parts):
            of_source = stored if part.entry is None else stored[part.entry]
            if not tensor.by_entry:
                yield None, (of_source, part)
            elif (tensor.name, entry) in self.replace:
                shape = tensor.shape[1:]
                yield entry, (self._replacement((tensor.name, entry), tensor.dtype, shape), None)
            else:
                yield entry, (of_source, part)

    def _stored(self, tensor: WrittenTensor) -> Any:
        """Return the bits of a tensor of the source, in the pages of its file."""
        info = self.source.tensors[tensor.stored]
        # Nothing is read ahead of what is written entry by entry, which may be larger than memory.
        data = self.source.data(tensor.stored, prefetch=not tensor.by_entry)
        return np.frombuffer(data, f"u{ITEM_BYTES[info.dtype]}").reshape(info.shape)

    def _replacement(self, key: str | tuple[str, int], stored: str, shape: tuple[int, ...]) -> Any:
        tensor, dtype = self.replace[key], TORCH_DTYPES[stored]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ArgumentError(
                f"replace[{key}] must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return flat.numpy().view(f"u{dtype.itemsize}").reshape(shape)

    def _build(self, tensor: WrittenTensor) -> Any:
        """Return the bits of a tensor that is replaced or padded."""
        shape = tensor.padded_from or tensor.shape
        (part, *_) = tensor.parts
        if tensor.name in self.replace:
            cut = self._replacement(tensor.name, tensor.dtype, shape)
        else:
            cut = self._stored(tensor).take(part.indices(), part.axis)
            self.source.release(tensor.stored)
        if tensor.padded_from is None:
            return cut
        padded = np.zeros(tensor.shape, cut.dtype)
        for from_block, to_block in zip(
            np.split(cut, part.times, part.axis),
            np.split(padded, part.times, part.axis),
            strict=True,
        ):
            to_block[tuple(slice(size) for size in from_block.shape)] = from_block  # a view
        return padded

    def _write_index(self, partial: Path) -> None:
        old = self.source.folder / INDEX
        metadata = read_json_object(old).get("metadata") if old.exists() else None
        metadata = metadata if isinstance(metadata, dict) else {}
        metadata = {k: v for k, v in metadata.items() if not isinstance(v, dict | list)}
        metadata["total_size"] = self.nbytes
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(
                math.prod(tensor.shape) for tensor in self.tensors.values()
            )
        weight_map = {each.name: file for file, tensors in self.shards.items() for each in tensors}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(partial / INDEX, index)

    def verify(self, partial: Path, progress: bool) -> None:
        """Read back what was written, from the disk where the system allows, and compare it.

        It is compared by numpy, which shares no code with what wrote it.
        """
        with byte_bar("verifying", self.nbytes, progress) as on_progress:
            for file, tensors in self.shards.items():
                _forget_cached(partial / file)
                written = SafetensorsFile(partial / file)
                if list(written.tensors) != [each.name for each in tensors]:
                    raise OutputError(f"{partial / file} reads back with other tensors")
                for tensor in tensors:
                    self._verify_tensor(written, tensor)
                    on_progress(tensor.nbytes)

    def _verify_tensor(self, written: SafetensorsFile, tensor: WrittenTensor) -> None:
        name = tensor.name
        same = written.tensors[name][:2] == (tensor.dtype, tensor.shape)
        if same:
            data = written.data(name, prefetch=not tensor.by_entry)
            found = np.frombuffer(data, f"u{ITEM_BYTES[tensor.dtype]}").reshape(tensor.shape)
            for entry, (expected, part) in self._parts(tensor):
                kept = None if part is None else part.indices()
                axis = 0 if part is None else part.axis
                same = same and _equal(
                    found if entry is None else found[entry], expected, axis, kept
                )
                written.release(name)
                self.source.release(tensor.stored)
        if not same:
            raise OutputError(f"tensor {name} of {written.path} does not read back as written")


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
