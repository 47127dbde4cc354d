"""A model folder on disk: found, and read without trust.

Only safetensors are read; nothing is ever unpickled and no code that came with a model is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hfprune_fast.architectures import family_of
from hfprune_fast.errors import CheckpointError, one_line

TINY_MODEL = Path(__file__).parent / "tiny"

_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What `from_pretrained` needs; nothing else is downloaded.
_HUB_FILES = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
_FINGERPRINT_ROWS = 16
# What changes when a checkpoint is saved again, but not what it computes.
_CONFIG_NOT_IN_FINGERPRINT = {"_name_or_path", "transformers_version", "use_cache"}


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
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"model {model} is a file; expected a model folder or a hub name")
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


def display_name(model: str | Path) -> str:
    """A model's or text's name as others know it: hub names stay, paths give their last part."""
    path = Path(model)
    return path.resolve().name if path.exists() else str(model)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder and refuse what this package cannot prune."""
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json; expected a model folder as save_pretrained writes it"
        )
    config = read_json_object(folder / "config.json")
    family_of(config)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise CheckpointError(
            f"{folder} is quantised ({method}), so its neurons cannot be cut; "
            "prune the unquantised checkpoint and quantise the result"
        )
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in the order of its index."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{folder / INDEX} names a file outside its folder: {name}")
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
    raise CheckpointError(f"{folder} has neither {_WEIGHTS} nor {INDEX}, and no other file is read")


def _weight_map(folder: Path) -> Mapping[str, str]:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files")
    return weight_map


def tensor_headers(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all shards; the data are not read, but their place is checked."""
    headers: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in headers:
                    raise CheckpointError(
                        f"tensor {name} is both in {headers[name].file} and in {path.name}"
                    )
                view = tensors.get_slice(name)
                headers[name] = TensorInfo(path.name, view.get_dtype(), tuple(view.get_shape()))
    if (folder / INDEX).exists() and not (folder / _WEIGHTS).exists():
        for name in sorted(set(_weight_map(folder)) - set(headers)):
            raise CheckpointError(f"tensor {name} is in the index of {folder} but in no shard")
    return headers


def read_tensor(folder: Path, headers: Mapping[str, TensorInfo], name: str) -> torch.Tensor:
    """Read one tensor of a checkpoint."""
    with open_tensors(folder / headers[name].file) as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, mapped; damage becomes one line that names the file."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); download it again"
        ) from None


def fingerprint(folder: Path) -> str:
    """Return a sha256 over the configuration and a sample of every tensor, however sharded.

    The sample is 16 rows of each matrix, evenly spaced from the first to the last, and all of each
    vector: enough to tell a fine-tuned sibling apart without reading the whole checkpoint.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in read_config(folder).items() if k not in _CONFIG_NOT_IN_FINGERPRINT}
    digest.update(json.dumps(config, sort_keys=True).encode())
    samples: dict[str, bytes] = {}
    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                samples[name] = _sample(tensors.get_slice(name))
    for name, sample in sorted(samples.items()):
        digest.update(f"{name}\n".encode() + sample)
    return digest.hexdigest()


def _sample(view: Any) -> bytes:
    """Return the digest of a tensor's dtype, shape and sampled rows."""
    shape = tuple(view.get_shape())
    digest = hashlib.sha256(f"{view.get_dtype()} {shape}".encode())
    if len(shape) < 2:
        rows = [view[:]] if shape else []
    else:
        last = shape[0] - 1
        picked = {last * i // (_FINGERPRINT_ROWS - 1) for i in range(_FINGERPRINT_ROWS)}
        rows = [view[row : row + 1] for row in sorted(picked)] if last >= 0 else []
    for row in rows:
        digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
