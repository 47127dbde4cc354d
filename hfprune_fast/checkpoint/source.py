"""ModelSource: a checkpoint opened once; its config and tensor headers are checked, not trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfprune_fast.checkpoint.config_json import read_config, widths_of
from hfprune_fast.checkpoint.fingerprint import (
    fingerprint_of,
    first_fingerprint,
    samples_of,
)
from hfprune_fast.checkpoint.folder import (
    IGNORED_SUFFIX,
    INDEX,
    TORCH_DTYPES,
    WEIGHTS,
    TensorInfo,
    check_plain,
    check_tensors_are,
    find_model,
    weight_files,
    weight_map_of,
)
from hfprune_fast.checkpoint.pretrained import load_config, load_tokenizer
from hfprune_fast.checkpoint.safetensors import SafetensorsFile
from hfprune_fast.checkpoint.source_card import source_card
from hfprune_fast.console import display_name
from hfprune_fast.errors import CheckpointError
from hfprune_fast.models.families import Family, family_of, family_type, neuron_axis
from hfprune_fast.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class ModelSource:
    """An opened model folder: its tensors are those of a gated-MLP model of its config's sizes.

    Fingerprint, tokenizer and transformers' config are made once, when first used.
    """

    name: str  # the hub name, or the last part of the path
    folder: Path
    config: dict[str, Any]  # config.json
    family: Family
    spec: ModelSpec
    tensors: dict[str, TensorInfo]
    shards: dict[str, SafetensorsFile]  # by file name, mapped

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the configuration means and a sample of every tensor it calls for."""
        head = f"{self.family.head}.weight"
        tied = self.config.get("tie_word_embeddings") is True
        samples = {
            name.removeprefix(f"{self.family.decoder}."): sample
            for name, sample in self._samples.items()
            if not name.endswith(IGNORED_SUFFIX) and not (tied and name == head)
        }
        return fingerprint_of(self.spec.model_type, self.transformers_config, samples)

    @cached_property
    def first_fingerprint(self) -> str:
        """The fingerprint that earlier releases wrote into scores files."""
        return first_fingerprint(self.config, self._samples)

    @cached_property
    def _samples(self) -> dict[str, bytes]:
        return samples_of(self.shards.values())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder, self.transformers_config, self.spec.vocab_size)

    @cached_property
    def transformers_config(self) -> Any:
        return load_config(self.folder, self.config)

    @cached_property
    def card(self) -> dict[str, Any]:
        """The licence and languages that its own model card names."""
        return source_card(self.folder)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of most of the parameters."""
        elements = Counter[str]()
        for info in self.tensors.values():
            elements[info.dtype] += prod(info.shape)
        return TORCH_DTYPES[elements.most_common(1)[0][0]]

    @property
    def has_prefix(self) -> bool:
        """Whether names begin with the base model's; those of a saved base model do not."""
        return any(name.startswith(f"{self.family.decoder}.") for name in self.tensors)

    def down_proj(self, layer: int) -> str:
        """Return the name of a layer's down_proj weight."""
        name = f"{self.family.layers}.{layer}.{self.family.down}.weight"
        return f"{self.family.decoder}.{name}" if self.has_prefix else name

    def data(self, name: str, *, prefetch: bool = True) -> memoryview:
        """Return the bytes of a tensor, mapped; with `prefetch`, reading them starts now."""
        return self.shards[self.tensors[name].file].data(name, prefetch=prefetch)

    def release(self, name: str) -> None:
        """Let the system drop a tensor's pages; they can be read again."""
        self.shards[self.tensors[name].file].release(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of a tensor."""
        info = self.tensors[name]
        data = torch.frombuffer(bytearray(self.data(name)), dtype=TORCH_DTYPES[info.dtype])
        return data.view(info.shape)


def open_source(model: str | Path | ModelSource) -> ModelSource:
    """Open a model folder, hub name or `demo`; return an open source unchanged.

    Raises:
        CheckpointError: a layer differs from the first in its tensors, an MLP, embedding, norm or
            head is missing, of another shape than the config's, or not floating-point.
        UnsupportedModelError: a family without a known gated MLP.
    """
    if isinstance(model, ModelSource):
        return model
    folder = find_model(model)
    config = read_config(folder)
    family = family_of(config)
    shards = {path.name: SafetensorsFile(path) for path in weight_files(folder)}
    tensors = _headers(folder, shards)
    widths = widths_of(folder / "config.json", config)
    decoder = f"{family.decoder}."
    if not any(name.startswith(decoder) for name in tensors):  # saved as base model
        decoder = ""
    in_layers = f"{decoder}{family.layers}."
    check_plain(folder, (name for name in tensors if name.startswith(in_layers)))
    biased, hidden = config.get("mlp_bias") is True, config["hidden_size"]
    expected = _layer_tensors(folder, family, decoder, tensors, widths, hidden, biased)
    linear = sum(prod(shape) for shape in expected.values() if len(shape) == 2)
    vocab = config["vocab_size"]
    embedding, head = f"{decoder}{family.embedding}.weight", f"{family.head}.weight"
    tied = config.get("tie_word_embeddings") is True
    expected |= {embedding: (vocab, hidden), f"{decoder}{family.norm}.weight": (hidden,)}
    if not tied or head in tensors:
        expected[head] = (vocab, hidden)
    check_tensors_are(folder, tensors, expected)
    attention = f"{decoder}{family.layers}.0.{family.attention_out}.weight"
    if attention not in tensors:
        raise CheckpointError(f"{folder} lacks the tensor {attention}")
    spec = ModelSpec(
        model_type=str(family_type(config)),
        num_layers=len(widths),
        hidden_size=hidden,
        intermediate_size=max(widths),
        total_params=sum(
            prod(shape) for name, shape in expected.items() if not (tied and name == head)
        ),
        linear_params=linear + vocab * hidden,
        params_per_neuron=3 * hidden + 2 * biased,
        mlp_widths=widths,
        vocab_size=vocab,
        attention_width=tensors[attention].shape[-1],
    )
    source = ModelSource(display_name(model), folder, config, family, spec, tensors, shards)
    if tied and head in tensors and not _equal(source, head, embedding):
        # transformers unties a head that is stored beside the embedding and differs from it.
        raise CheckpointError(
            f"{folder} ties its head to the embedding, yet {head} differs from {embedding}; "
            "set tie_word_embeddings to false in its config.json"
        )
    return source


def _headers(folder: Path, shards: Mapping[str, SafetensorsFile]) -> dict[str, TensorInfo]:
    """Return the tensors of all shards, each in one of them, and all that the index names."""
    headers: dict[str, TensorInfo] = {}
    for file, shard in shards.items():
        for name, (dtype, shape, _, _) in shard.tensors.items():
            if name in headers:
                both = f"{headers[name].file} and in {file}"
                raise CheckpointError(f"tensor {name} is both in {both}")
            headers[name] = TensorInfo(file, dtype, shape)
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        for name in sorted(set(weight_map_of(folder)) - set(headers)):
            raise CheckpointError(f"tensor {name} is in the index of {folder} but in no shard")
    return headers


def _layer_tensors(
    folder: Path,
    family: Family,
    decoder: str,
    tensors: Mapping[str, TensorInfo],
    widths: tuple[int, ...],
    hidden: int,
    biased: bool,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all layers' tensors: outside the MLPs those of the first layer."""
    first = f"{decoder}{family.layers}.0."
    others = {
        name.removeprefix(first): info.shape
        for name, info in tensors.items()
        if name.startswith(first)
        and neuron_axis(family, name) is None
        and not name.endswith(IGNORED_SUFFIX)
    }

    if len(others) * len(widths) > 4 * len(tensors):  # before as many names are made
        raise CheckpointError(
            f"{folder}/config.json has num_hidden_layers {len(widths)}, "
            f"but its files hold {len(tensors)} tensors"
        )

    def mlp(width: int) -> dict[str, tuple[int, ...]]:
        wide = (width, hidden)
        shapes: dict[str, tuple[int, ...]] = {
            family.gate: wide, family.up: wide, family.down: wide[::-1],
        }  # fmt: skip
        biases = {f"{part}.bias": shape[:1] for part, shape in shapes.items() if biased}
        return {f"{part}.weight": shape for part, shape in shapes.items()} | biases

    return {
        f"{decoder}{family.layers}.{i}.{name}": shape
        for i, width in enumerate(widths)
        for name, shape in (others | mlp(width)).items()
    }


def _equal(source: ModelSource, name: str, other: str) -> bool:
    if source.tensors[name].dtype != source.tensors[other].dtype:
        return False
    a, b = source.data(name), source.data(other)
    return len(a) == len(b) and all(
        bytes(a[at : at + _BLOCK_BYTES]) == bytes(b[at : at + _BLOCK_BYTES])
        for at in range(0, len(a), _BLOCK_BYTES)
    )
