"""A model folder on disk: found, and its files read without trust and without transformers.

Only safetensors are read; nothing is ever unpickled and no code that came with a model is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hfprune_fast.checkpoint.safetensors import ITEM_BYTES
from hfprune_fast.config import TINY_MODEL
from hfprune_fast.console import human_bytes
from hfprune_fast.errors import ArgumentError, CheckpointError, one_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20
_SHARD_NAME = re.compile(r"\w[\w. +@=-]{0,200}\.safetensors")
# What `from_pretrained` needs, and the card with the licence; nothing else is downloaded.
_HUB_FILES = (
    *("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"),
    *("LICENSE*", "NOTICE*", "README.md"),
)
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# Buffers that old LLaMA checkpoints carry and transformers computes itself.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def find_model(model: str | Path, *, config_only: bool = False) -> Path:
    """Return the folder of a model given as a folder, as `demo`, or by its hub name.

    A folder of that name comes first, then `demo` (the model that ships with this package), then
    the hub, of which only safetensors, tokenizer and configuration are downloaded.
    """
    if not isinstance(model, str | Path):
        raise ArgumentError(
            f"expected a model folder or hub name, got a {type(model).__name__}; a loaded model "
            "can be given to hf.score, hf.refit_down_proj, hf.prune and hf.evaluate"
        )
    folder = Path(model)
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"model {model} is a file; expected a model folder or a hub name")
    except OSError as error:  # a name too long, a folder that may not be read
        raise CheckpointError(f"model folder cannot be read: {one_line(error)}") from None
    if str(model) == "demo":
        return TINY_MODEL
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
        raise CheckpointError(f"no model folder {model}, and that is not a hub name either")
    return _download(str(model), ("config.json",) if config_only else _HUB_FILES)


@cache
def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # offline, unknown, private and gated each have their own class
        raise CheckpointError(
            f"no model folder {name}, and the hub says: {one_line(error)}"
        ) from None


def read_json_object(path: Path, max_bytes: int = _MAX_INDEX_BYTES) -> dict[str, Any]:
    """Parse a JSON file that must hold an object; at most so much of it is read."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise ValueError("no such regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"it is larger than {human_bytes(max_bytes)}")
        value = json.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def is_deeper(value: Any, levels: int) -> bool:
    """Return whether a value of JSON is nested deeper than so many levels."""
    inner = list(value.values()) if isinstance(value, dict) else value
    return isinstance(inner, list) and (levels == 0 or any(is_deeper(v, levels - 1) for v in inner))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in the order of its index."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        names = sorted(set(weight_map_of(folder).values()))
        for name in names:
            if not _SHARD_NAME.fullmatch(name):
                raise CheckpointError(
                    f"{folder / INDEX} names a file outside its folder, or that is no "
                    f"safetensors file: {name!r:.60}"
                )
            if not (folder / name).exists():
                raise CheckpointError(
                    f"{folder} lacks the shard {name} that its index names; download it again"
                )
        return [folder / name for name in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} has only pickled weights (.bin/.pth), which are never opened here; use a "
            "safetensors revision, or save it again with save_pretrained where you trust the file"
        )
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}, and no other file is read")


def weight_map_of(folder: Path) -> Mapping[str, str]:
    """Return {tensor name: file name} of a folder's index."""
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files")
    return weight_map


# Marks in names, of what is no plain weight or bias.
_ADAPTED = ("lora_", "base_layer", "adapter")
_CHANGED = ("qweight", "qzeros", "g_idx", "weight_scale", "absmax", "SCB")
_CHANGED += ("parametrizations", "_orig", "_mask", "weight_g", "weight_v")


def check_tensors_are(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    left_alone: Callable[[str], bool],
) -> None:
    """Raise CheckpointError unless the tensors are floats of the expected names and shapes.

    Others may be there if they are `left_alone`, which pruning copies.
    """
    unknown = {name for name in tensors.keys() - expected.keys() if not left_alone(name)}
    for name in sorted(unknown):
        adapted = any(mark in name for mark in _ADAPTED)
        if adapted or any(mark in name for mark in _CHANGED):
            advice = "merge the adapter" if adapted else "is it quantised, masked or parametrised?"
            raise CheckpointError(
                f"{folder} has {name}, which is no plain weight or bias; {advice}"
            )
    for problem, names in (
        ("lacks the tensor", expected.keys() - tensors.keys()),
        ("has a tensor that its architecture does not know:", unknown),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{folder} {problem} {min(names)}{more}")
    for name, info in tensors.items():
        if info.shape != expected.get(name, info.shape):
            raise CheckpointError(
                f"{folder} has a tensor whose shape is not its config's: {name} is {info.shape}, "
                f"expected {expected[name]}"
            )
        allowed = TORCH_DTYPES if name in expected else ITEM_BYTES
        if info.dtype not in allowed:
            raise CheckpointError(
                f"{folder} has {name} in {info.dtype}, expected one of {', '.join(allowed)}; "
                "is it quantised?"
            )
