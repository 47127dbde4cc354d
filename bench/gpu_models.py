"""Random models of real shapes, in memory and as checkpoints, for what scores whole models."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_timer import DEVICE, GPU, seconds, size
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

BF16 = torch.bfloat16
SEQ_LEN = 1024 if GPU else 32
# Left free on a disk that a checkpoint is written to.
SPARE_BYTES = 8 << 30 if GPU else 0


@dataclass(frozen=True)
class Shape:
    """A Llama's, the head untied."""

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def layer_params(self) -> int:
        """Weights of one layer's linear layers."""
        attention = 2 * self.hidden**2 * (self.heads + self.kv_heads) // self.heads
        return attention + self.mlp_params

    @property
    def mlp_params(self) -> int:
        return 3 * self.hidden * self.width

    @property
    def head_params(self) -> int:
        return self.hidden * self.vocab

    def config(self, layers: int) -> LlamaConfig:
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=2 * SEQ_LEN,
            tie_word_embeddings=False,
        )
        config.dtype, config.architectures = BF16, ["LlamaForCausalLM"]
        return config


class Progress:
    """What a phase that scores has found so far; its JSON file is kept up to date."""

    def __init__(self, phase: str, out: Path, limit_s: float) -> None:
        self.phase, self.out = phase, out
        self._begun = time.monotonic()
        self.deadline = self._begun + limit_s  # nothing new is started after it
        self.result: dict[str, Any] = {"rows": [], "skipped": [], "errors": []}

    @classmethod
    def from_arguments(cls, phase: str, description: str | None) -> Progress:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
        parser.add_argument("--seconds", type=float, default=100, help="start nothing new after")
        args = parser.parse_args()
        if not GPU:
            torch.set_num_threads(1)  # which serves a rehearsal's sizes best
        return cls(phase, args.out, args.seconds)

    def note(self, what: str) -> None:
        print(f"{time.monotonic() - self._begun:6.1f} s  {what}", flush=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps({self.phase: self.result}))
        part.replace(self.out)

    def failed(self, what: str, error: Exception) -> None:
        """Keep an error and go on."""
        text = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.result["errors"].append(text)
        self.note(text)
        if GPU:
            torch.cuda.empty_cache()


def fill(name: str, tensor: Tensor) -> Tensor:
    """Random weights: products keep their size, and logits of about 2.5 make some p stand out."""
    if tensor.ndim == 1:
        return tensor.fill_(1)
    gain = 2.5 if "lm_head" in name else 1.2
    return tensor.normal_(std=gain / math.sqrt(tensor.shape[1]))


def random_model(shape: Shape) -> PreTrainedModel:
    """A bf16 model, made where it will run; its rotary tables are fp32, as always."""
    with torch.device(DEVICE):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape.config(shape.layers), dtype=BF16
        )
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    return model


def random_ids(sequences: int, vocab: int) -> Tensor:
    """(N, T) int64 on the CPU, always the same."""
    return torch.randint(vocab, (sequences, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def write_checkpoint(folder: Path, shape: Shape, *, most_layers: int, deadline: float) -> int:
    """Write a random bf16 checkpoint, a shard a layer, and return how many layers it has.

    Those are 2 at least and most_layers at most, and as many as the time and the disk allow. Each
    has data of its own, so that a layer that ran with another's weights would show.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(1), dtype=BF16)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    first = "model.layers.0."
    layer_shapes = {n.removeprefix(first): s for n, s in shapes.items() if n.startswith(first)}
    weight_map: dict[str, str] = {}
    total = 0

    def write(file: str, wanted: dict[str, torch.Size]) -> None:
        nonlocal total
        tensors = {
            name: fill(name, torch.empty(shape, dtype=BF16, device=DEVICE)).cpu()
            for name, shape in wanted.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        sync(folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for name in sorted(shapes.keys() - {first + name for name in layer_shapes}):
        write(f"{name}.safetensors", {name: shapes[name]})
    layers = 0
    while layers < most_layers:
        needed = 2 * shape.layer_params + SPARE_BYTES
        if layers >= 2 and (time.monotonic() > deadline or shutil.disk_usage(folder).free < needed):
            break
        prefix = f"model.layers.{layers}."
        write(f"layer-{layers:02}.safetensors", {prefix + n: s for n, s in layer_shapes.items()})
        layers += 1
    shape.config(layers).save_pretrained(folder)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def sync(path: Path) -> None:
    """Wait until a file is on its disk; only then can its memory be taken back."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def evict(folder: Path) -> None:
    """Have the system forget what it holds of a folder's files, so that they are read anew."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def filesystem(folder: Path) -> str:
    """The kind of the file system that a folder is on; tmpfs, say, is no disk."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(mount, kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return max(above, key=lambda found: len(found[0]))[1]


def products() -> tuple[Callable[[], object], int]:
    """The yardstick: a call that makes some large bf16 products, and their FLOPs."""
    n, count = size(8192), 50 if GPU else 2
    a, b = torch.randn(2, n, n, dtype=BF16, device=DEVICE)
    out = torch.empty_like(a)

    def call() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return call, count * 2 * n**3


def gemm_tflops() -> float:
    """The rate of `products`, after a call to warm up."""
    call, flops = products()
    call()
    return flops / statistics.median(seconds(call) for _ in range(5)) / 1e12
