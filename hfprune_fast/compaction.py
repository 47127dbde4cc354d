"""keep -> a smaller model of the same architecture, in memory or from disk to disk.

gate_proj and up_proj lose rows (and bias entries), down_proj loses columns. On disk every other
tensor is copied byte for byte, so the dtype and all that is not MLP stay what they were.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hfprune_fast.architectures import family_of, neuron_axis, parts_of
from hfprune_fast.checkpoint import open_tensors, read_config, tensor_headers, weight_files
from hfprune_fast.errors import ArgumentError, OutputError
from hfprune_fast.report import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "hfprune.json"
_INDEX = "model.safetensors.index.json"
# Weights in other formats are those of the dense model; the card and the index are made anew.
_NOT_COPIED_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"),
    *(".pkl", ".pickle", ".index.json"),
)
_NOT_COPIED = ("config.json", RECORD, "README.md", ".gitattributes", ".gitignore")


def prune(model: PreTrainedModel, keep: Mapping[int, Tensor]) -> None:
    """Cut a loaded model's MLPs down to the kept neurons, in place.

    Args:
        model: a causal language model of a known family.
        keep: {layer: sorted int64 indices}, every layer, one width.

    Raises:
        ArgumentError: keep does not fit the model.
    """
    mlps = parts_of(model).mlps
    dense = mlps[0].gate.out_features
    width = _check_keep(keep, len(mlps), dense)
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
    record: dict[str, Any] | None = None,
    card: str = "",
) -> None:
    """Write the pruned copy of a checkpoint folder, shard by shard; the model is never built.

    Args:
        source: a safetensors model folder; it is only read.
        out: the folder to make. It appears under this name only when whole.
        keep: {layer: sorted int64 indices}, every layer, one width.
        force: replace `out` if it is a model folder already.
        record: what goes into hfprune.json beside the kept indices.
        card: text of the README.md.

    Raises:
        OutputError: out exists, overlaps the source or cannot be written.
        CheckpointError: the source is damaged.
        ArgumentError: keep does not fit the model.

    Memory: one shard. Shards keep their names; tokenizer, generation config etc. are copied.
    """
    source, out = Path(source), Path(out)
    check_output_folder(out, source, force=force)
    config = read_config(source)
    width = _check_keep(keep, config["num_hidden_layers"], config["intermediate_size"])
    with _whole_folder(out) as partial:
        _write_json(partial / "config.json", {**config, "intermediate_size": width})
        _write_weights(source, partial, keep)
        kept = {str(layer): indices.tolist() for layer, indices in sorted(keep.items())}
        _write_json(partial / RECORD, {**(record or {}), "keep": kept}, indent=None)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        for path in sorted(source.iterdir()):
            if path.is_file() and not _is_replaced(path.name):
                shutil.copyfile(path, partial / path.name)


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
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise OutputError(f"out {out} exists and is not empty; --force replaces it")
        if not (out / "config.json").exists():
            raise OutputError(
                f"out {out} exists and is no model folder; --force replaces only model folders"
            )
    parent = _nearest_folder(target.parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"out {out} cannot be made: no permission to write in {parent}")
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"out {out} takes {human_bytes(needed_bytes)}, "
            f"but only {human_bytes(free_bytes)} are free in {parent}"
        )


def _nearest_folder(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise OutputError(f"{path} is a file, expected a folder to write in")
    return path


def _check_keep(keep: Mapping[int, Tensor], num_layers: int, dense: int) -> int:
    """Return the one width of keep."""
    if sorted(keep) != list(range(num_layers)):
        raise ArgumentError(
            f"keep must have an entry for each layer 0..{num_layers - 1}, got {sorted(keep)}"
        )
    widths = {len(indices) for indices in keep.values()}
    if len(widths) != 1:
        raise ArgumentError(f"keep must have one width for all layers, got {sorted(widths)}")
    for layer, indices in keep.items():
        ok = (
            len(indices) > 0
            and indices.dtype == torch.int64
            and bool((indices.diff() > 0).all())
            and int(indices[0]) >= 0
            and int(indices[-1]) < dense
        )
        if not ok:
            raise ArgumentError(
                f"keep[{layer}] must be sorted, distinct int64 indices in 0..{dense - 1}"
            )
    return widths.pop()


def _cut_parameter(parameter: Tensor, axis: int, kept: Tensor) -> nn.Parameter:
    cut = parameter.detach().index_select(axis, kept)
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)


def _write_weights(source: Path, partial: Path, keep: Mapping[int, Tensor]) -> None:
    family = family_of(read_config(source))
    headers = tensor_headers(source)
    total_bytes = 0
    for path in weight_files(source):
        tensors: dict[str, Tensor] = {}
        with open_tensors(path) as opened:
            metadata = opened.metadata() or {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = opened.get_tensor(name)
                place = neuron_axis(family, name)
                if place is not None:
                    tensor = tensor.index_select(place[1], keep[place[0]])
                tensors[name] = tensor
                total_bytes += tensor.nbytes
        save_file(tensors, partial / path.name, metadata)
        # save_file makes files that only their owner may read.
        shutil.copymode(partial / "config.json", partial / path.name)
    if (source / _INDEX).exists():
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: info.file for name, info in sorted(headers.items())},
        }
        _write_json(partial / _INDEX, index)


def _is_replaced(name: str) -> bool:
    return name in _NOT_COPIED or name.endswith(_NOT_COPIED_SUFFIXES)


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def leftovers(out: Path) -> list[Path]:
    """Folders that runs killed before their end left beside `out`."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.partial-*"))


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or is removed on any error."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            with path.open("rb+") as file:  # Windows syncs no read-only handle
                os.fsync(file.fileno())
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists():
            if out.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(out)
