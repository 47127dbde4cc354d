"""Models with the vocabulary of the shipped tokenizer, and checkpoints of any size."""

import hashlib
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from truth import tiny_model

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.pretrained import load_tokenizer


def random_llama(**overrides: Any) -> PreTrainedModel:
    """A random fp32 Llama of 3 layers x 96 neurons."""
    return tiny_model("llama", dtype=torch.float32, **{"vocab_size": vocabulary(), **overrides})


@cache
def vocabulary() -> int:
    """Return how many tokens the shipped tokenizer has."""
    return len(load_tokenizer(TINY_MODEL))


def save_tokenizer(folder: Path) -> None:
    """Save the shipped tokenizer as transformers does."""
    for name, data in _tokenizer_files().items():
        (folder / name).write_bytes(data)


@cache
def _tokenizer_files() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        load_tokenizer(TINY_MODEL).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def some_keep(layers: int = 3, dense: int = 96, width: int = 61) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        layer: torch.randperm(dense, generator=generator)[:width].sort().values
        for layer in range(layers)
    }


def snapshot(folder: Path) -> dict[str, str]:
    """Return the digest of each file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def synthetic_checkpoint(
    folder: Path, *, hidden: int, width: int, layers: int, vocab: int, heads: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:  # fmt: skip
    """Write a random Llama, a shard a layer, without building it; return the folder."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads, architectures=["LlamaForCausalLM"], dtype=dtype,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for i in range(layers + 1):
        prefix = f"model.layers.{i}." if i < layers else ("model.norm", "model.embed", "lm_head")
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
            if len(shape) == 2
            else torch.ones(shape, dtype=dtype)
            for name, shape in shapes.items()
            if name.startswith(prefix)
        }
        file = f"model-{i + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    metadata = {"total_size": total, "total_parameters": total // dtype.itemsize, "note": "kept"}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
