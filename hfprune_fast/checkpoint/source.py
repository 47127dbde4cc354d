"""ModelSource: a checkpoint opened once; its config and tensor headers are checked, not trusted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfprune_fast.checkpoint.config_json import read_config, text_config
from hfprune_fast.checkpoint.fingerprint import (
    fingerprint_of,
    sample_of,
    sample_of_rows,
)
from hfprune_fast.checkpoint.folder import (
    IGNORED_SUFFIX,
    INDEX,
    TORCH_DTYPES,
    WEIGHTS,
    TensorInfo,
    check_tensors_are,
    find_model,
    weight_files,
    weight_map_of,
)
from hfprune_fast.checkpoint.pretrained import load_config, load_tokenizer
from hfprune_fast.checkpoint.safetensors import SafetensorsFile
from hfprune_fast.checkpoint.skeleton import skeleton as make_skeleton
from hfprune_fast.checkpoint.source_card import source_card
from hfprune_fast.checkpoint.stored_names import (
    DECODER,
    check_layers,
    held_across,
    names_in_files,
    prefix_and_head,
    shape_of_one,
    swapped,
)
from hfprune_fast.console import display_name
from hfprune_fast.errors import CheckpointError, one_line_errors
from hfprune_fast.models.declared import family_of
from hfprune_fast.models.families import Family
from hfprune_fast.models.sites import SiteKey
from hfprune_fast.models.spec import ModelSpec, spec_of
from hfprune_fast.models.tensors import Place, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class ModelSource:
    """An opened model folder: its tensors are those that its config calls for.

    Of a model with a text tower, family, spec, names and transformers' config are the tower's.
    Fingerprint, tokenizer and transformers' config are made once, when first used.
    """

    name: str  # the hub name, or the last part of the path
    folder: Path
    config: dict[str, Any]  # config.json
    text: dict[str, Any]  # what is run of it, see `text_config`
    family: Family
    spec: ModelSpec
    # Of the model's parameters -> of the checkpoint's tensors that, side by side, are it.
    names: dict[str, tuple[str, ...]]
    prefix: str  # begins the names of the decoder's tensors
    across: frozenset[str]  # tensors whose last two axes are the model's, the other way round
    tensors: dict[str, TensorInfo]
    shards: dict[str, SafetensorsFile]  # by file name, mapped

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the configuration means and a sample of every tensor it calls for."""
        samples = {
            ours.removeprefix(DECODER): self._sample_of(ours)
            for ours in self.names
            if not (self._tied and ours == f"{self.family.head}.weight")
        }
        return fingerprint_of(self.spec.model_type, self.transformers_config, samples)

    @property
    def _tied(self) -> bool:
        return self.text.get("tie_word_embeddings") is True

    def _sample_of(self, ours: str) -> bytes:
        """Return the sample of a parameter, of experts the same however they are stored."""
        theirs = self.names[ours]
        infos = [self.tensors[name] for name in theirs]
        parts = [self.data(name, prefetch=False) for name in theirs]
        place = place_of(self.family, ours.removeprefix(DECODER))
        if len(theirs) > 1 or (place is not None and place.of_all and len(infos[0].shape) == 3):
            return sample_of_rows([info.dtype for info in infos], infos[0].shape[-1], parts)
        return sample_of(infos[0].dtype, infos[0].shape, parts[0])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder, self.transformers_config, self.spec.vocab_size)

    @cached_property
    def transformers_config(self) -> Any:
        return load_config(self.folder, self.text)

    @cached_property
    def card(self) -> dict[str, Any]:
        """The licence and languages that its own model card names."""
        return source_card(self.folder)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of most of the parameters."""
        elements = Counter[str]()
        for name in {name for theirs in self.names.values() for name in theirs}:
            elements[self.tensors[name].dtype] += prod(self.tensors[name].shape)
        return TORCH_DTYPES[elements.most_common(1)[0][0]]

    def place_of(self, name: str) -> Place | None:
        """Return what a tensor of the checkpoint holds of neurons or experts, None if nothing.

        Layers behind the model's, which predict further tokens, are not cut.
        """
        place = place_of(self.family, name.removeprefix(self.prefix))
        if place is None or place.layer >= self.spec.num_layers:
            return None
        if name in self.across and place.axis is not None:
            return replace(place, axis=1 - place.axis)
        return place

    def is_beyond(self, name: str) -> bool:
        """Return whether a tensor is of a layer behind the model's, which it does not run."""
        place = place_of(self.family, name.removeprefix(self.prefix))
        return place is not None and place.layer >= self.spec.num_layers

    def down_proj(self, layer: int) -> str:
        """Return the name of the down_proj weight of a layer's own MLP."""
        experts, site = self.family.experts, self.family.site
        if experts is not None and self.spec.experts and self.spec.experts[layer]:
            site = experts.shared or site
        (name,) = self.names[f"{DECODER}{self.family.layers}.{layer}.{site.down}.weight"]
        return name

    def rows_of_mlp(self, layer: int) -> list[str]:
        """Return the names of gate's and up's weights, or the one of both, of a dense layer."""
        site, path = self.family.site, f"{DECODER}{self.family.layers}.{layer}"
        leaves = dict.fromkeys((site.gate, site.up))
        return [self.names[f"{path}.{leaf}.weight"][0] for leaf in leaves]

    def expert_down_proj(self, layer: int, expert: int) -> str | tuple[str, int]:
        """Return the name of an expert's down_proj weight, as `replace` of a pruning has it.

        Of a tensor that holds all experts of the layer, it is the name and the expert's number. Its
        weight is (D, F); (F, D) where the family's are `transposed`, and of a tensor `across`.
        """
        experts = self.family.experts
        path = "" if experts is None else experts.path
        names = self.names[f"{DECODER}{self.family.layers}.{layer}.{path}.down_proj"]
        return names[expert] if len(names) > 1 else (names[0], expert)

    def down_weight(self, site: SiteKey) -> torch.Tensor:
        """Return a copy of the down projection (D, F) of a layer's own MLP or of an expert."""
        if isinstance(site, int):
            return self.read(self.down_proj(site))
        name = self.expert_down_proj(*site)
        if isinstance(name, str):
            return self.read(name)
        weight, described = self.read(name[0])[name[1]], self.family.experts
        is_turned = (described is not None and described.transposed) or name[0] in self.across
        return weight.t() if is_turned else weight

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in."""
        return TORCH_DTYPES[self.tensors[name].dtype]

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
        CheckpointError: a tensor that the config calls for is missing, of another shape or not
            floating-point, or there is one that it does not call for.
        UnsupportedModelError: a family without a known gated MLP.
    """
    if isinstance(model, ModelSource):
        return model
    folder = find_model(model)
    config = read_config(folder)
    path = folder / "config.json"
    text, family = text_config(path, config), family_of(config)
    shards = {file.name: SafetensorsFile(file) for file in weight_files(folder)}
    tensors = _headers(folder, shards)
    prefix, head = prefix_and_head(family, tensors)
    check_layers(folder, f"{prefix}{family.layers}.", tensors, text["num_hidden_layers"])
    embedding = f"{prefix}{family.embedding}.weight"
    if text.get("tie_word_embeddings") is True and {head, embedding} <= tensors.keys():
        # transformers unties a head that is stored beside the embedding and differs from it.
        text["tie_word_embeddings"] = _equal(shards, tensors, head, embedding)
        if not text["tie_word_embeddings"] and family.tower is None:
            raise CheckpointError(
                f"{folder} ties its head to the embedding, yet {head} differs from {embedding}; "
                "set tie_word_embeddings to false in its config.json"
            )
    with one_line_errors(f"{path} does not make a model"):
        made = make_skeleton(load_config(folder, text))
        spec = spec_of(made)
    names = names_in_files(made, family, prefix, head, tensors.keys(), spec.num_experts)
    shapes = {
        name: shape_of_one(tuple(tensor.shape), len(names[ours]))
        for ours, tensor in made.state_dict().items()
        for name in names[ours]
    }
    across = held_across(family, prefix, shapes, tensors)
    shapes |= {name: swapped(shapes[name]) for name in across}
    if text.get("tie_word_embeddings") is True:
        names[f"{family.head}.weight"] = (embedding,)
        if head not in tensors:
            del shapes[head]
    check_tensors_are(folder, tensors, shapes, _LeftAlone(made, family, prefix))
    return ModelSource(
        display_name(model), folder, config, text, family,
        spec, names, prefix, across, tensors, shards,
    )  # fmt: skip


class _LeftAlone:
    """Whether a tensor that the model does not have may be there, as it is never used.

    Old LLaMA checkpoints have buffers that transformers computes itself; a family's class ignores
    more, such as layers that predict further tokens (mtp); a text tower stands beside others.
    """

    def __init__(self, skeleton: PreTrainedModel, family: Family, prefix: str) -> None:
        self._ignored = list(skeleton._keys_to_ignore_on_load_unexpected or [])
        self._tower: tuple[str, ...] | None = None
        if family.tower is not None:
            own = (family.layers, family.embedding, family.norm)
            # What begins as the whole model's does may be of another tower.
            whole = prefix == DECODER
            self._tower = tuple(f"{prefix}{part}." for part in own) if whole else (prefix,)

    def __call__(self, name: str) -> bool:
        if self._tower is not None and not name.startswith(self._tower):
            return "lora_" not in name and "base_layer" not in name
        return name.endswith(IGNORED_SUFFIX) or any(re.search(p, name) for p in self._ignored)


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


def _equal(
    shards: Mapping[str, SafetensorsFile], tensors: Mapping[str, TensorInfo], name: str, other: str
) -> bool:
    if tensors[name].dtype != tensors[other].dtype:
        return False
    a, b = (shards[tensors[each].file].data(each) for each in (name, other))
    return len(a) == len(b) and all(
        bytes(a[at : at + _BLOCK_BYTES]) == bytes(b[at : at + _BLOCK_BYTES])
        for at in range(0, len(a), _BLOCK_BYTES)
    )
