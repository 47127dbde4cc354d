"""keep -> a smaller model of the same architecture, in memory or from disk to disk.

gate_proj and up_proj lose rows (and bias entries), down_proj loses columns. On disk every other
tensor is copied byte for byte, so the dtype and all that is not MLP stay what they were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hfprune_fast._version import __version__
from hfprune_fast.architectures import family_of, neuron_axis, parts_of
from hfprune_fast.checkpoint import (
    INDEX,
    TensorInfo,
    display_name,
    find_model,
    open_tensors,
    read_config,
    read_json_object,
    weight_files,
)
from hfprune_fast.errors import ArgumentError, CheckpointError, NumericsError, OutputError
from hfprune_fast.loading import check_tensors, model_size
from hfprune_fast.output import check_writable, whole_folder
from hfprune_fast.report import model_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "hfprune.json"
# Weights in other formats are those of the dense model; the card and the index are made anew.
_NOT_COPIED_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".pkl", ".pickle", ".index.json"),
)
_TEMPLATES = "additional_chat_templates"
_NOT_COPIED = ("config.json", RECORD, "README.md", ".gitattributes", ".gitignore")


def prune(model: PreTrainedModel, keep: Mapping[int, Tensor]) -> None:
    """Cut a loaded model's MLPs down to the kept neurons, in place.

    Args:
        model: a causal language model of a known family.
        keep: {layer: sorted int64 indices}, every layer, one width.

    Raises:
        ArgumentError: keep does not fit the model; nothing was cut.
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
    force: bool = False,
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the pruned copy of a checkpoint, shard by shard; its weights are never loaded whole.

    Args:
        source: a model folder, hub name or `demo`; it is only read.
        out: the folder to make. It appears under this name only when whole.
        keep: {layer: sorted int64 indices}, every layer, one width.
        force: replace `out` if all it holds was written by this function.
        record: added to hfprune.json: "asked" and "provenance", which the model card shows too.

    Returns:
        What was achieved: widths, parameters, ratios.

    Raises:
        OutputError: out exists, overlaps the source or cannot be written.
        CheckpointError: the source is damaged, or its tensors are not those of its config.
        ArgumentError: keep does not fit the model.

    Memory: one shard. Shards keep their names; tokenizer, generation config etc. are copied.
    """
    folder, target = find_model(source), Path(out).resolve()
    check_output_folder(target, folder, force=force)
    size = model_size(folder)
    keep, width = _check_keep(keep, size.num_layers, size.intermediate_size)
    headers = check_tensors(folder)
    achieved = size.pruned_to(width)
    full_record = {
        "hfprune_fast": __version__,
        "base_model": display_name(source),
        "achieved": achieved,
        **(record or {}),
    }
    kept = {str(layer): indices.tolist() for layer, indices in sorted(keep.items())}
    with whole_folder(target, force) as partial:
        _write_json(partial / "config.json", {**read_config(folder), "intermediate_size": width})
        _write_weights(folder, headers, partial, keep)
        (partial / "README.md").write_text(model_card(full_record), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            replaced = path.name in _NOT_COPIED or path.name.endswith(_NOT_COPIED_SUFFIXES)
            if path.is_file() and not replaced:
                shutil.copyfile(path, partial / path.name)
        if (folder / _TEMPLATES).is_dir():
            shutil.copytree(folder / _TEMPLATES, partial / _TEMPLATES)
        files = sorted(_files_in(partial) | {RECORD})
        _write_json(partial / RECORD, {**full_record, "files": files, "keep": kept}, indent=None)
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
    cut = parameter.detach().index_select(axis, kept)
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)


def _write_weights(
    source: Path, headers: Mapping[str, TensorInfo], partial: Path, keep: Mapping[int, Tensor]
) -> None:
    family = family_of(read_config(source))
    total_bytes = 0
    for path in weight_files(source):
        tensors: dict[str, Tensor] = {}
        with open_tensors(path) as opened:
            metadata = opened.metadata() or {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = opened.get_tensor(name)
                if tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
                    raise NumericsError(f"{path}: tensor {name} holds NaN or inf")
                place = neuron_axis(family, name)
                if place is not None:
                    tensor = tensor.index_select(place[1], keep[place[0]])
                tensors[name] = tensor
                total_bytes += tensor.nbytes
        save_file(tensors, partial / path.name, metadata)
        # save_file makes files that only their owner may read.
        shutil.copymode(partial / "config.json", partial / path.name)
    if (source / INDEX).exists():
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: info.file for name, info in sorted(headers.items())},
        }
        _write_json(partial / INDEX, index)


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
