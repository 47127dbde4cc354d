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

from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.folder import INDEX, TORCH_DTYPES, WEIGHTS, read_json_object
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.console import byte_bar
from hfprune_fast.errors import ArgumentError, NumericsError, OutputError
from hfprune_fast.models.families import neuron_axis

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
        self.kept_shapes: dict[str, tuple[int, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # as written, with zeros up to pad_to neurons
        for name, info in source.tensors.items():
            kept_shape = shape = info.shape
            place = neuron_axis(source.family, name)
            if place is not None:
                layer, axis = place
                self.cuts[name] = axis, keep[layer].cpu().contiguous().numpy()
                width = len(keep[layer])
                kept_shape = (*shape[:axis], width, *shape[axis + 1 :])
                shape = (*shape[:axis], max(width, pad_to), *shape[axis + 1 :])
            self.kept_shapes[name], self.shapes[name] = kept_shape, shape
        for name in replace:
            if name not in self.shapes:
                raise ArgumentError(f"replace names {name}, which the checkpoint does not have")
        self.shards = self._shards(shard_bytes)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * native.ITEM_BYTES[self.source.tensors[name].dtype]

    def _shards(self, most_bytes: int | None) -> dict[str, list[str]]:
        """Return the tensors of each file: the source's, or as many as fit into most_bytes."""
        shards: dict[str, list[str]] = {}
        if most_bytes is None:
            for name, info in self.source.tensors.items():
                shards.setdefault(info.file, []).append(name)
            return shards
        groups: list[list[str]] = [[]]
        filled = 0
        for name in self.source.tensors:
            if groups[-1] and filled + self.nbytes(name) > most_bytes:
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
            byte_bar("writing", total, progress) as done,
            ThreadPoolExecutor(threads, thread_name_prefix="hfprune-write") as pool,
        ):
            for file, names in self.shards.items():
                known = self.source.shards.get(file)
                writer = native.new_file(
                    partial / file,
                    metadata if known is None else known.metadata or {"format": "pt"},
                    [(n, self.source.tensors[n].dtype, self.shapes[n]) for n in names],
                )
                tasks = {pool.submit(self._write_tensor, writer, n): n for n in names}
                try:
                    for task in as_completed(tasks):
                        task.result()
                        done(self.nbytes(tasks[task]))
                    writer.close()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    writer.discard()
                    raise
        if list(self.shards) != [WEIGHTS]:
            self._write_index(partial, total)

    def _write_tensor(self, writer: Any, name: str) -> None:
        made = self._made(name)
        if made is not None:
            finite = writer.write(name, made.reshape(-1).view(np.uint8))
        else:
            info = self.source.tensors[name]
            axis, kept = self.cuts.get(name, (0, None))
            finite = writer.write(name, self.source.data(name), axis, kept)
            self.source.shards[info.file].done_with(name)
        if not finite:
            raise NumericsError(f"{self.source.folder}: tensor {name} holds NaN or inf")

    def _made(self, name: str) -> Any:
        """Return a tensor that is no plain cut of the source's: replaced or padded; or None."""
        shape = self.kept_shapes[name]
        if name not in self.replace and self.shapes[name] == shape:
            return None
        info = self.source.tensors[name]
        kind = f"u{native.ITEM_BYTES[info.dtype]}"
        axis, kept = self.cuts.get(name, (0, None))
        if name in self.replace:
            tensor = self.replace[name]
            if tuple(tensor.shape) != shape or tensor.dtype != TORCH_DTYPES[info.dtype]:
                raise ArgumentError(
                    f"replace[{name}] must be {shape} {TORCH_DTYPES[info.dtype]}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            cut = flat.numpy().view(kind).reshape(shape)
        else:
            whole = np.frombuffer(self.source.data(name), kind).reshape(info.shape)
            cut = whole.take(kept, axis)
            self.source.shards[info.file].done_with(name)
        if self.shapes[name] == shape:
            return cut
        padded = np.zeros(self.shapes[name], kind)
        padded[tuple(slice(size) for size in shape)] = cut
        return padded

    def _write_index(self, partial: Path, total_bytes: int) -> None:
        old = self.source.folder / INDEX
        metadata = read_json_object(old).get("metadata") if old.exists() else None
        metadata = dict(metadata) if isinstance(metadata, dict) else {}
        metadata["total_size"] = total_bytes
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(shape) for shape in self.shapes.values())
        weight_map = {name: file for file, names in self.shards.items() for name in names}
        write_json(
            partial / INDEX,
            {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))},
        )

    def verify(self, partial: Path, progress: bool) -> None:
        """Read back what was written, from the disk where the system allows, and compare it.

        By numpy, which shares nothing with what wrote it.
        """
        total = sum(map(self.nbytes, self.shapes))
        with byte_bar("verifying", total, progress) as done:
            for file, names in self.shards.items():
                _forget_cached(partial / file)
                written = native.SafetensorsFile(partial / file)
                if list(written.tensors) != names:
                    raise OutputError(f"{partial / file} reads back with other tensors")
                for name in names:
                    self._verify_tensor(written, name)
                    done(self.nbytes(name))

    def _verify_tensor(self, written: native.SafetensorsFile, name: str) -> None:
        info = self.source.tensors[name]
        same = written.tensors[name][:2] == (info.dtype, self.shapes[name])
        kind = f"u{native.ITEM_BYTES[info.dtype]}"
        ours = np.frombuffer(written.data(name), kind)
        axis, kept = self.cuts.get(name, (0, None))
        made = self._made(name)
        if made is not None:
            theirs, kept = made.reshape(-1), None
        else:
            theirs = np.frombuffer(self.source.data(name), kind)
        rows, dense_rows = (self.shapes[name] or (1,))[0], (info.shape or (1,))[0]
        if same and kept is None:
            theirs, ours = theirs.reshape(rows, -1), ours.reshape(rows, -1)
        elif same:
            theirs, ours = theirs.reshape(dense_rows, -1), ours.reshape(rows, -1)
        step = max(1, _VERIFIED_BYTES // max(1, theirs[:1].nbytes))
        for row in range(0, rows, step):
            if not same:
                break
            part = slice(row, row + step)
            expected = theirs[part] if kept is None or axis == 1 else theirs[kept[part]]
            if kept is not None and axis == 1:
                expected = expected[:, kept]
            same = np.array_equal(expected, ours[part])
        if not same:
            raise OutputError(f"tensor {name} of {written.path} does not read back as written")
        written.done_with(name)
        self.source.shards[info.file].done_with(name)


def _forget_cached(path: Path) -> None:
    """Put a file on the disk and its pages out of memory, so that the next read is of the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
