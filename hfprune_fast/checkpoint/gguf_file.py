"""A GGUF file in which each layer has its own width, made of one that is padded with zero neurons.

llama.cpp's own converter makes the padded file, so that tokenizer, chat template and rotary tables
are its work. Here the padding goes, and the file takes the architecture of llama.cpp whose loader
reads a feed_forward_length for each layer and computes the same:

    deci       llama and mistral; qwen2, with the rows of q and k in the order of its rotary pairs
    openelm    qwen3 with tied embeddings, with q, k and v in one tensor

No other architecture of llama.cpp has a width for each layer of these families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfprune_fast.errors import ArgumentError, CheckpointError, one_line

Bytes = NDArray[np.uint8]
_GLOBAL = {f"{name}.weight" for name in ("token_embd", "output_norm", "output", "rope_freqs")}
_PARTS = {f"attn_{name}.weight" for name in ("norm", "q", "k", "v", "output")}
_PARTS |= {f"ffn_{name}.weight" for name in ("norm", "gate", "up", "down")}
# What else a layer may have; any other tensor would be read by nothing, or cut in the wrong place.
_MORE_PARTS = {
    "qwen2": {f"attn_{name}.bias" for name in "qkv"},
    "qwen3": {"attn_q_norm.weight", "attn_k_norm.weight"},
}
TRIED = ("llama", "mistral", "qwen2", "qwen3")  # what those architectures were tried with
# What the other architectures do not read.
_ONLY_ITS_OWN = ("attention.temperature_scale", "attention.sliding_window")
_TARGETS = {"llama": "deci", "mistral3": "deci", "qwen2": "deci", "qwen3": "openelm"}


@dataclass(frozen=True)
class _Output:
    """A tensor to be written: its shape with the bytes of a row in place of its numbers."""

    name: str
    shape: tuple[int, ...]
    type: Any
    make: Callable[[], Bytes]


def package() -> Any:
    """Return the package gguf."""
    try:
        import gguf
    except ImportError:
        raise ArgumentError(
            "GGUF files need the package gguf: pip install 'hfprune_fast[gguf]'"
        ) from None
    return gguf


def target_of(architecture: str, tied: bool) -> str | None:
    """Return the architecture with a width for each layer that computes the same, if there is one.

    Args:
        architecture: of the padded file.
        tied: whether the head is the embedding.
    """
    target = _TARGETS.get(architecture)
    return None if target == "openelm" and not tied else target


def target_of_file(padded: Path) -> str | None:
    """Return `target_of` of a GGUF file."""
    with _errors(padded):
        return _target(package().GGUFReader(padded))


def _target(reader: Any) -> str | None:
    architecture = _value(reader, "general.architecture")
    if any(f"{architecture}.{key}" in reader.fields for key in _ONLY_ITS_OWN):
        return None
    names = {tensor.name for tensor in reader.tensors}
    return target_of(architecture, tied="output.weight" not in names)


def narrow(padded: Path, out: Path) -> list[int]:
    """Write a GGUF file without its padding neurons; return the width of each layer.

    A padding neuron's column of ffn_down is zero, and no other neuron follows it.

    Memory: one tensor.

    Raises:
        ArgumentError: the package gguf is missing; no architecture has a width for each layer of
            this model; a quantised ffn_down whose blocks the widths would break.
        CheckpointError: the file is no GGUF file, or lacks what its architecture needs.
    """
    gguf = package()
    with _errors(padded):
        reader = gguf.GGUFReader(padded)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        architecture = _value(reader, "general.architecture")
        if architecture in _TARGETS.values():
            raise ArgumentError(f"{padded} has a width for each layer already")
        target = _target(reader)
        if target is None:
            raise ArgumentError(
                f"{padded} is of architecture {architecture}, for which llama.cpp has no form with "
                "a width for each layer; use the padded file"
            )
        _check_names(padded, architecture, tensors)
        layers = range(_value(reader, f"{architecture}.block_count"))
        widths = [_width(tensors[f"blk.{layer}.ffn_down.weight"]) for layer in layers]
        heads = {
            part: _value(reader, f"{architecture}.attention.{name}")
            for part, name in (("attn_q", "head_count"), ("attn_k", "head_count_kv"))
        }
        outputs = list(_outputs(gguf, tensors, architecture, widths, heads))
        writer = gguf.GGUFWriter(out, target)
        for field in reader.fields.values():
            _copy(gguf, field, writer, architecture, target)
        writer.add_array(f"{target}.feed_forward_length", widths)
        for each in outputs:
            size = int(np.prod(each.shape))
            writer.add_tensor_info(each.name, each.shape, np.dtype(np.uint8), size, each.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in outputs:
            writer.write_tensor_data(np.ascontiguousarray(each.make()))
        writer.close()
    return widths


@contextmanager
def _errors(padded: Path) -> Iterator[None]:
    """Turn whatever the package raises over a damaged file into one line."""
    try:
        yield
    except (ArgumentError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{padded} is not a GGUF file of a padded model, or is damaged ({one_line(error)})"
        ) from None


def _check_names(padded: Path, architecture: str, names: Iterable[str]) -> None:
    """Refuse a file with a tensor of which it is not known what becomes of it."""
    known = _PARTS | _MORE_PARTS.get(architecture, set())
    for name in names:
        part = re.sub(r"^blk\.\d+\.", "", name)
        if part not in (_GLOBAL if part == name else known):
            raise ArgumentError(
                f"{padded} has {name[:100]}, which has no place in a file with a width for each "
                "layer; use the padded file"
            )


def _value(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def _bytes_of(tensor: Any) -> Bytes:
    """Return a tensor's bytes, (..., bytes of a row), mapped."""
    data: Bytes = np.asarray(tensor.data).view(np.uint8)
    return data


def _width(down: Any) -> int:
    """Return how many columns of ffn_down there are up to the last that is not zero."""
    width = int(down.shape[0])
    blocks = _bytes_of(down).reshape(int(down.shape[1]), -1)
    used = np.zeros(blocks.shape[1], dtype=bool)
    for rows in np.array_split(blocks, max(1, blocks.nbytes >> 26)):  # 64 MB at a time
        used |= rows.any(axis=0)
    last = int(np.flatnonzero(used)[-1]) + 1
    return -(-last * width // blocks.shape[1])  # a block of a quantised row holds several columns


def _outputs(
    gguf: Any,
    tensors: Mapping[str, Any],
    architecture: str,
    widths: list[int],
    heads: Mapping[str, int],
) -> Iterator[_Output]:
    """Yield the tensors of the narrow file."""
    for name, tensor in tensors.items():
        data = _bytes_of(tensor)
        prefix, _, rest = name.partition(".")
        layer, _, part = rest.rpartition(".")[0].partition(".")
        make = partial(np.asarray, data)
        shape = data.shape
        if prefix == "blk" and part in ("ffn_gate", "ffn_up"):
            make = partial(np.asarray, data[: widths[int(layer)]])
            shape = (widths[int(layer)], *shape[1:])
        elif prefix == "blk" and part == "ffn_down":
            block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            if widths[int(layer)] % block:
                raise ArgumentError(
                    f"{name} is quantised in blocks of {block}, which its width "
                    f"{widths[int(layer)]} breaks; narrow the file in f16 or bf16, then quantise"
                )
            shape = (shape[0], widths[int(layer)] // block * size)
            make = partial(np.asarray, data[:, : shape[1]])
        elif prefix == "blk" and architecture == "qwen2" and part in heads:
            make = partial(_interleaved, data, tensor, heads[part])
        elif prefix == "blk" and architecture == "qwen3" and part in ("attn_k", "attn_v"):
            continue  # in the tensor of q
        elif prefix == "blk" and architecture == "qwen3" and part == "attn_q":
            parts = [tensors[name.replace("attn_q", f"attn_{letter}")] for letter in "qkv"]
            if len({each.tensor_type for each in parts}) != 1:
                raise ArgumentError(
                    f"q, k and v of layer {layer} are of different types; narrow the file in f16 "
                    "or bf16, then quantise"
                )
            all_bytes = [_bytes_of(each) for each in parts]
            shape = (sum(len(each) for each in all_bytes), shape[1])
            make = partial(np.concatenate, all_bytes)
            name = name.replace("attn_q", "attn_qkv")
        yield _Output(name, tuple(shape), tensor.tensor_type, make)


def _interleaved(data: Bytes, tensor: Any, heads: int) -> Bytes:
    """Return the rows of q or k with the two of each rotary pair side by side."""
    rows = data.reshape(int(tensor.shape[-1]), -1)
    pairs = rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2)
    return pairs.reshape(data.shape)


def _copy(gguf: Any, field: Any, writer: Any, architecture: str, target: str) -> None:
    """Write one value of the header, under the new architecture's name if it is of the old one."""
    own = f"{architecture}."
    if field.name.startswith("GGUF.") or field.name in (
        "general.architecture", f"{own}feed_forward_length",
    ):  # fmt: skip
        return
    name = f"{target}.{field.name[len(own) :]}" if field.name.startswith(own) else field.name
    sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
