"""A model folder on disk: found, and read without trust and without transformers.

Only safetensors are read; nothing is ever unpickled and no code that came with a model is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from hfprune_fast.checkpoint.safetensors import ITEM_BYTES, SafetensorsFile
from hfprune_fast.errors import CheckpointError, one_line
from hfprune_fast.models.families import NON_UNIFORM, Family, family_of, family_type, neuron_axis
from hfprune_fast.models.spec import ModelSize

TINY_MODEL = Path(__file__).parents[1] / "tiny"

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What `from_pretrained` needs; nothing else is downloaded.
_HUB_FILES = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_FINGERPRINT_ROWS = 16
_BLOCK_BYTES = 16 << 20
# Buffers that old LLaMA checkpoints carry and transformers computes itself.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
# What changes when a checkpoint is saved again, but not what it computes.
_CONFIG_NOT_IN_FINGERPRINT = {"_name_or_path", "auto_map", "transformers_version", "use_cache"}


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
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
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
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}, and no other file is read")


def _weight_map(folder: Path) -> Mapping[str, str]:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files")
    return weight_map


def tensor_headers(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all shards; the data are not read, but their place is checked."""
    headers: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        for name, (dtype, shape, _, _) in SafetensorsFile(path).tensors.items():
            if name in headers:
                raise CheckpointError(
                    f"tensor {name} is both in {headers[name].file} and in {path.name}"
                )
            headers[name] = TensorInfo(path.name, dtype, shape)
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        for name in sorted(set(_weight_map(folder)) - set(headers)):
            raise CheckpointError(f"tensor {name} is in the index of {folder} but in no shard")
    return headers


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder: its tensors are those of a gated-MLP model of its config's sizes."""

    folder: Path
    config: dict[str, Any]
    family: Family
    tensors: dict[str, TensorInfo]
    size: ModelSize

    @cached_property
    def paths(self) -> list[Path]:
        """The shards."""
        return weight_files(self.folder)

    @cached_property
    def files(self) -> dict[str, SafetensorsFile]:
        """The shards by name, mapped."""
        return {path.name: SafetensorsFile(path) for path in self.paths}

    def data(self, name: str, *, prefetch: bool = True) -> memoryview:
        """Return the bytes of a tensor, mapped; with `prefetch`, reading them starts now."""
        return self.files[self.tensors[name].file].data(name, prefetch=prefetch)

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of a tensor."""
        info = self.tensors[name]
        data = torch.frombuffer(bytearray(self.data(name)), dtype=TORCH_DTYPES[info.dtype])
        return data.view(info.shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a model folder by its config and headers alone.

    Raises:
        CheckpointError: a layer differs from the first in its tensors, an MLP, embedding, norm or
            head is missing, of another shape than the config's, or not floating-point.
    """
    config = read_config(folder)
    family = family_of(config)
    tensors = tensor_headers(folder)
    sizes = {}
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{folder}/config.json has {key} {value!r}, expected a positive integer"
            )
        sizes[key] = value
    layers, hidden, _, vocab = sizes.values()
    widths = _widths(folder, config)
    decoder = f"{family.decoder}."
    if not any(name.startswith(decoder) for name in tensors):  # saved as base model
        decoder = ""
    first = f"{decoder}{family.layers}.0."
    layer = {
        name.removeprefix(first): info.shape
        for name, info in tensors.items()
        if name.startswith(first) and neuron_axis(family, name) is None
    }
    biased = config.get("mlp_bias") is True

    def mlp(width: int) -> dict[str, tuple[int, ...]]:
        tensors: dict[str, tuple[int, ...]] = {}
        for part, shape in (
            (family.gate, (width, hidden)),
            (family.up, (width, hidden)),
            (family.down, (hidden, width)),
        ):
            tensors[f"{part}.weight"] = shape
            if biased:
                tensors[f"{part}.bias"] = shape[:1]
        return tensors

    layer = {name: shape for name, shape in layer.items() if not name.endswith(_IGNORED_SUFFIX)}
    expected = {
        f"{decoder}{family.layers}.{i}.{name}": shape
        for i, width in enumerate(widths)
        for name, shape in (layer | mlp(width)).items()
    }
    linear = sum(prod(shape) for shape in expected.values() if len(shape) == 2)
    embedding, head = f"{decoder}{family.embedding}.weight", f"{family.head}.weight"
    tied = config.get("tie_word_embeddings") is True
    expected |= {embedding: (vocab, hidden), f"{decoder}{family.norm}.weight": (hidden,)}
    if not tied or head in tensors:
        expected[head] = (vocab, hidden)
    check_tensors_are(folder, tensors, expected)
    counted = sum(prod(shape) for name, shape in expected.items() if not (tied and name == head))
    size = ModelSize(
        model_type=str(family_type(config)),
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=max(widths),
        total_params=counted,
        linear_params=linear + vocab * hidden,
        params_per_neuron=3 * hidden + 2 * biased,
        mlp_widths=widths,
    )
    checkpoint = Checkpoint(folder, config, family, tensors, size)
    if tied and head in tensors and not _equal(checkpoint, head, embedding):
        # transformers unties a head that is stored beside the embedding and differs from it.
        raise CheckpointError(
            f"{folder} ties its head to the embedding, yet {head} differs from {embedding}; "
            "set tie_word_embeddings to false in its config.json"
        )
    return checkpoint


def _widths(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the width of each layer's MLP that a config.json tells of."""
    layers, widest = config["num_hidden_layers"], config["intermediate_size"]
    widths: Any = [widest] * layers
    if str(config["model_type"]).startswith(NON_UNIFORM) and config.get("mlp_widths") is not None:
        widths = config["mlp_widths"]
    elif config.get("per_layer_config"):  # transformers' own way to say it
        try:
            told = {int(i): dict(of) for i, of in config["per_layer_config"].items()}
        except (AttributeError, TypeError, ValueError):
            told = {-1: {}}
        if any(set(of) != {"intermediate_size"} for of in told.values()):
            raise CheckpointError(
                f"{folder}/config.json has a per_layer_config that is not {{layer: "
                '{"intermediate_size": width}}, and nothing else is known here'
            )
        widths = [
            told.get(i, {"intermediate_size": widest})["intermediate_size"] for i in range(layers)
        ]
    ok = isinstance(widths, list) and len(widths) == layers
    if not ok or not all(type(w) is int and 1 <= w <= widest for w in widths):
        raise CheckpointError(
            f"{folder}/config.json must have an MLP width in 1..{widest} for each of its "
            f"{layers} layers, got {widths!r}"
        )
    return tuple(widths)


def check_tensors_are(
    folder: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless the tensors are floats of the expected names and shapes."""
    stored = {name: info for name, info in tensors.items() if not name.endswith(_IGNORED_SUFFIX)}
    for problem, names in (
        ("lacks the tensor", expected.keys() - stored.keys()),
        ("has a tensor that its architecture does not know:", stored.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{folder} {problem} {min(names)}{more}")
    for name, info in stored.items():
        if info.shape != expected[name]:
            raise CheckpointError(
                f"{folder} has a tensor whose shape is not its config's: {name} is {info.shape}, "
                f"expected {expected[name]}"
            )
        if info.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{folder} has {name} in {info.dtype}, expected one of {', '.join(ITEM_BYTES)}; "
                "is it quantised?"
            )


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    if checkpoint.tensors[name].dtype != checkpoint.tensors[other].dtype:
        return False
    a, b = checkpoint.data(name), checkpoint.data(other)
    return len(a) == len(b) and all(
        bytes(a[at : at + _BLOCK_BYTES]) == bytes(b[at : at + _BLOCK_BYTES])
        for at in range(0, len(a), _BLOCK_BYTES)
    )


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
        file = SafetensorsFile(path)
        for name, (dtype, shape, _, _) in file.tensors.items():
            samples[name] = _sample(dtype, shape, file.data(name))
    for name, sample in sorted(samples.items()):
        digest.update(f"{name}\n".encode() + sample)
    return digest.hexdigest()


def _sample(dtype: str, shape: tuple[int, ...], data: memoryview) -> bytes:
    """Return the digest of a tensor's dtype, shape and sampled rows."""
    digest = hashlib.sha256(f"{dtype} {shape}".encode())
    rows: Iterable[int] = [0]
    row_bytes = len(data)
    if len(shape) >= 2 and shape[0] > 0:
        row_bytes //= shape[0]
        last = shape[0] - 1
        rows = sorted({last * i // (_FINGERPRINT_ROWS - 1) for i in range(_FINGERPRINT_ROWS)})
    for row in rows:
        digest.update(data[row * row_bytes : (row + 1) * row_bytes])
    return digest.digest()
