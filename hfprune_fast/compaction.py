"""keep -> a smaller model of the same architecture, in memory or from disk to disk.

gate_proj and up_proj lose rows (and bias entries), down_proj loses columns. On disk every other
tensor is copied byte for byte, so the dtype and all that is not MLP stay what they were.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hfprune_fast import native
from hfprune_fast._version import __version__
from hfprune_fast.architectures import neuron_axis, parts_of
from hfprune_fast.checkpoint import (
    INDEX,
    TORCH_DTYPES,
    WEIGHTS,
    Checkpoint,
    display_name,
    find_model,
    open_checkpoint,
    read_json_object,
)
from hfprune_fast.errors import ArgumentError, CheckpointError, NumericsError, OutputError
from hfprune_fast.output import check_writable, whole_folder
from hfprune_fast.report import byte_bar, model_card, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "hfprune.json"
# Weights in other formats are those of the dense model; the card and the index are made anew.
_NOT_COPIED_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".pkl", ".pickle", ".index.json"),
)
_TEMPLATES = "additional_chat_templates"
_VERIFIED_BYTES = 16 << 20  # compared at once
_NOT_COPIED = ("config.json", RECORD, "README.md", ".gitattributes", ".gitignore")


def prune(model: PreTrainedModel, keep: Mapping[int, Tensor]) -> None:
    """Cut a loaded model's MLPs down to the kept neurons, in place.

    Args:
        model: a causal language model of a known family.
        keep: {layer: sorted int64 indices}, every layer, one width.

    Raises:
        ArgumentError: keep does not fit the model; nothing was cut.

    Memory: each parameter gets storage of exactly its kept size, and the old one goes before the
    next is cut, so that at most one parameter's kept bytes are held twice.
    """
    mlps = parts_of(model).mlps
    dense = mlps[0].gate.out_features
    keep, width = _check_keep(keep, len(mlps), dense)
    for layer, mlp in enumerate(mlps):
        kept = keep[layer].to(mlp.gate.weight.device)
        for linear in (mlp.gate, mlp.up):
            linear.weight = _cut_parameter(linear.weight, 0, kept)
            if linear.bias is not None:
                linear.bias = _cut_parameter(linear.bias, 0, kept)
            linear.out_features = width
        mlp.down.weight = _cut_parameter(mlp.down.weight, 1, kept)
        mlp.down.in_features = width
    model.config.intermediate_size = width
    for module in model.modules():  # LlamaMLP and its kin repeat the config's width
        if getattr(module, "intermediate_size", None) == dense:
            module.intermediate_size = width  # type: ignore[assignment]


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    keep: Mapping[int, Tensor],
    *,
    replace: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = False,
    force: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the pruned copy of a checkpoint in one streaming pass; no model is built.

    Args:
        source: a model folder, hub name or `demo`; it is only read.
        out: the folder to make. It appears under this name only when whole.
        keep: {layer: sorted int64 indices}, every layer, one width.
        replace: {tensor name: tensor} written in place of what the cut leaves, of its shape and
            dtype (a refitted down_proj, say). Each is asked for in its turn, and again to verify.
        max_shard_size: bytes, or "5GB", "512MiB"; by default the source's shards are kept.
        verify: read the written tensors back from the disk and compare them with the source.
        force: replace `out` if all it holds was written by this function.
        record: added to hfprune.json: "asked" and "provenance", which the model card shows too.
        progress: show a bar on stderr.

    Returns:
        What was achieved: widths, parameters, ratios.

    Raises:
        OutputError: out exists, overlaps the source or cannot be written, or reads back otherwise.
        CheckpointError: the source is damaged, or its tensors are not those of its config.
        ArgumentError: keep, replace or max_shard_size do not fit the model.
        NumericsError: a value that was to be written is NaN or infinite.

    Memory: a block of 256 KiB a thread (without the C++ extension, a tensor a thread); the source
    is mapped, and its pages are given back. Tokenizer, generation config etc. are copied.
    """
    folder, target = find_model(source), Path(out).resolve()
    check_output_folder(target, folder, force=force)
    checkpoint = open_checkpoint(folder)
    size = checkpoint.size
    keep, width = _check_keep(keep, size.num_layers, size.intermediate_size)
    shard_bytes = None
    if max_shard_size is not None:
        shard_bytes = parse_bytes(max_shard_size, "max_shard_size")
    writing = _Writing(checkpoint, keep, width, replace or {}, shard_bytes)
    achieved = size.pruned_to(width)
    full_record = {
        "hfprune_fast": __version__,
        "base_model": display_name(source),
        "achieved": achieved,
        **(record or {}),
    }
    kept = {str(layer): indices.tolist() for layer, indices in sorted(keep.items())}
    with whole_folder(target, force) as partial:
        _write_json(partial / "config.json", {**checkpoint.config, "intermediate_size": width})
        writing.write(partial, progress)
        (partial / "README.md").write_text(model_card(full_record), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            replaced = path.name in _NOT_COPIED or path.name.endswith(_NOT_COPIED_SUFFIXES)
            if path.is_file() and not replaced:
                shutil.copyfile(path, partial / path.name)
        if (folder / _TEMPLATES).is_dir():
            shutil.copytree(folder / _TEMPLATES, partial / _TEMPLATES)
        files = sorted(_files_in(partial) | {RECORD})
        _write_json(partial / RECORD, {**full_record, "files": files, "keep": kept}, indent=None)
        if verify:
            writing.verify(partial, progress)
    return achieved


def check_output_folder(out: Path, source: Path, *, force: bool, needed_bytes: int = 0) -> None:
    """Refuse an output that would lose something or has no room, before any work is done."""
    target, origin = out.resolve(), source.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise OutputError(
            f"out {out} is, is inside or is above the source {source}, which is never written to; "
            "choose another place"
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"out {out} is a file; expected a folder that does not exist")
    if target == Path.cwd() or target in Path.cwd().parents or target.is_mount():
        raise OutputError(f"out {out} is the current folder or a mount point; name one below it")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise OutputError(f"out {out} exists and is not empty; --force replaces it")
        others = sorted(_files_in(out) - _files_written(out))
        if others:
            raise OutputError(
                f"out {out} holds {others[0]}, which hfprune did not write; --force replaces "
                f"only what its {RECORD} lists"
            )
    check_writable(out, needed_bytes)


def _files_in(folder: Path) -> set[str]:
    """Relative paths of all files and links in a folder, at any depth."""
    paths = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return {path.relative_to(folder).as_posix() for path in paths}


def _files_written(out: Path) -> set[str]:
    """What the record of an earlier output says was written into it."""
    try:
        return set(read_json_object(out / RECORD)["files"])
    except (CheckpointError, KeyError, TypeError):
        return set()


def _check_keep(
    keep: Mapping[int, Tensor], num_layers: int, dense: int
) -> tuple[dict[int, Tensor], int]:
    """Return keep as int64 tensors, and its one width."""
    if not isinstance(keep, Mapping) or sorted(keep) != list(range(num_layers)):
        got = sorted(keep) if isinstance(keep, Mapping) else f"a {type(keep).__name__}"
        raise ArgumentError(
            f"keep must have an entry for each layer 0..{num_layers - 1}, got {got}"
        )
    tensors = {layer: torch.as_tensor(indices) for layer, indices in keep.items()}
    for layer, indices in tensors.items():
        ok = (
            indices.dim() == 1
            and len(indices) > 0
            and indices.dtype == torch.int64
            and bool((indices.diff() > 0).all())
            and int(indices[0]) >= 0
            and int(indices[-1]) < dense
        )
        if not ok:
            raise ArgumentError(
                f"keep[{layer}] must be sorted, distinct int64 indices in 0..{dense - 1}"
            )
    widths = {len(indices) for indices in tensors.values()}
    if len(widths) != 1:
        raise ArgumentError(f"keep must have one width for all layers, got {sorted(widths)}")
    return tensors, widths.pop()


def _cut_parameter(parameter: Tensor, axis: int, kept: Tensor) -> nn.Parameter:
    whole = parameter.detach()
    matrix = whole if whole.dim() == 2 else whole[:, None]
    shape = (len(kept), matrix.shape[1]) if axis == 0 else (matrix.shape[0], len(kept))
    cut = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    compact = native.compact_rows if axis == 0 else native.compact_columns
    compact(matrix, kept, out=cut)
    return nn.Parameter(
        cut if whole.dim() == 2 else cut[:, 0], requires_grad=parameter.requires_grad
    )


class _Writing:
    """The weights of one pruned checkpoint: where each tensor goes, and what becomes of it."""

    def __init__(
        self,
        source: Checkpoint,
        keep: Mapping[int, Tensor],
        width: int,
        replace: Mapping[str, Tensor],
        shard_bytes: int | None,
    ) -> None:
        self.source, self.replace = source, replace
        self.cuts: dict[str, tuple[int, Any]] = {}  # axis and the indices that stay
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, info in source.tensors.items():
            shape = info.shape
            place = neuron_axis(source.family, name)
            if place is not None:
                layer, axis = place
                self.cuts[name] = axis, keep[layer].cpu().contiguous().numpy()
                shape = (*shape[:axis], width, *shape[axis + 1 :])
            self.shapes[name] = shape
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
            for file in reversed(self.source.files.values())
            for key, value in (file.metadata or {"format": "pt"}).items()
        }
        threads = max(2, torch.get_num_threads())
        with (
            byte_bar("writing", total, progress) as done,
            ThreadPoolExecutor(threads, thread_name_prefix="hfprune-write") as pool,
        ):
            for file, names in self.shards.items():
                known = self.source.files.get(file)
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
        if name in self.replace:
            finite = writer.write(name, self._replacement(name))
        else:
            info = self.source.tensors[name]
            axis, kept = self.cuts.get(name, (0, None))
            finite = writer.write(name, self.source.data(name), axis, kept)
            self.source.files[info.file].done_with(name)
        if not finite:
            raise NumericsError(f"{self.source.folder}: tensor {name} holds NaN or inf")

    def _replacement(self, name: str) -> Any:
        tensor = self.replace[name]
        dtype = self.source.tensors[name].dtype
        if tuple(tensor.shape) != self.shapes[name] or tensor.dtype != TORCH_DTYPES[dtype]:
            raise ArgumentError(
                f"replace[{name}] must be {self.shapes[name]} {TORCH_DTYPES[dtype]}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()

    def _write_index(self, partial: Path, total_bytes: int) -> None:
        old = self.source.folder / INDEX
        metadata = read_json_object(old).get("metadata") if old.exists() else None
        metadata = dict(metadata) if isinstance(metadata, dict) else {}
        metadata["total_size"] = total_bytes
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(shape) for shape in self.shapes.values())
        weight_map = {name: file for file, names in self.shards.items() for name in names}
        _write_json(
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
        if name in self.replace:
            theirs, kept = np.frombuffer(self._replacement(name), kind), None
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
        self.source.files[info.file].done_with(name)


def _forget_cached(path: Path) -> None:
    """Put a file on the disk and its pages out of memory, so that the next read is of the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
