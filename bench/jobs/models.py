"""Random Llamas of chosen sizes, in memory and as checkpoints, for what scores whole models."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @property
    def layer_params(self) -> int:
        """The number of weights in one layer's linear layers."""
        attention = 2 * self.hidden**2 * (self.heads + self.kv_heads) // self.heads
        return attention + self.mlp_params

    @property
    def mlp_params(self) -> int:
        return 3 * self.hidden * self.width

    @property
    def head_params(self) -> int:
        return self.hidden * self.vocab

    @property
    def sizes(self) -> dict[str, int]:
        return {"L": self.layers, "D": self.hidden, "F": self.width, "V": self.vocab}

    def config(self, layers: int, dtype: torch.dtype = torch.bfloat16) -> LlamaConfig:
        config = LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.width, num_hidden_layers=layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab, max_position_embeddings=2048, tie_word_embeddings=self.tied,
        )  # fmt: skip
        config.dtype, config.architectures = dtype, ["LlamaForCausalLM"]
        return config

    def needed_flops(self, tokens: int) -> int:
        """Return what any provider needs: 2 FLOPs a token and weight of a linear layer forward, and
        2 for the gradient at the layer's input where a down_proj lies below it. Attention's two
        products and the reference's weight gradients are not counted.
        """
        linear = self.layers * self.layer_params + self.head_params
        first = self.layer_params - self.mlp_params // 3
        return tokens * (4 * linear - 2 * first)


def fill(name: str, tensor: Tensor) -> Tensor:
    """Fill with random weights: products keep their size, logits of about 2.5 make p uneven."""
    if tensor.ndim == 1:
        return tensor.fill_(1)
    gain = 2.5 if "lm_head" in name else 1.2
    return tensor.normal_(std=gain / math.sqrt(tensor.shape[1]))


def random_model(
    shape: Shape, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Return a model made where it will run; its rotary tables are fp32, as always."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape.config(shape.layers, dtype), dtype=dtype
        )
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    return model


def random_ids(sequences: int, seq_len: int, vocab: int) -> Tensor:
    """Return (N, T) int64 on the CPU, always the same."""
    return torch.randint(vocab, (sequences, seq_len), generator=torch.Generator().manual_seed(1))


def relative_errors(got: Tensor, want: Tensor) -> Tensor:
    """Return ‖got - want‖ / ‖want‖ of each layer, (L,) fp64 on the CPU; NaN where there is one."""
    got, want = got.double().cpu(), want.double().cpu()
    return (got - want).norm(dim=1) / want.norm(dim=1)


def checked(name: str, error: Tensor, allowed: Tensor) -> dict[str, float]:
    """Return the error that comes closest to what is allowed; raise where one is beyond."""
    worst = int((error / allowed).nan_to_num(nan=torch.inf).argmax())
    if not bool((error <= allowed).all()):  # so NaN is refused, too
        raise ValueError(
            f"{name}: the l1 of layer {worst} is off by {float(error[worst]):.1e} of its norm; "
            f"{float(allowed[worst]):.1e} would be rounding"
        )
    return {"error": float(error[worst]), "error_allowed": float(allowed[worst])}


def checked_scores(
    name: str, ours: Tensor, reference: Tensor, shape: Shape, samples: int, seq_len: int,
    dtype: str = "bfloat16",
) -> dict[str, float]:  # fmt: skip
    """Compare our l1 with the reference's, both (L, F), by what rounding explains.

    With u half of eps: the reference rounds each product, each sum over the tokens and each of
    N totals: N + 2. Each gradient went through the roundings of some 14 products a layer, of either
    sign, which the sum over the tokens averages: sqrt(14 · L / seq_len) on either side. Both
    compute log p + H in fp32 from two terms of about ln V: 2 ln V of fp32's u each. And the
    reference adds V terms of p log p up in fp32, with roundings of either sign: sqrt(V).
    """
    u, u_fp32 = (torch.finfo(d).eps / 2 for d in (getattr(torch, dtype), torch.float32))
    averaged = 2 * math.sqrt(14 * max(8, shape.layers) / seq_len)
    of_entropy = 4 * math.log(shape.vocab) + math.sqrt(shape.vocab)
    band = (samples + 2 + max(1.0, averaged)) * u + of_entropy * u_fp32
    error = relative_errors(reference, ours)
    return checked(name, error, torch.full_like(error, band))


def write_checkpoint(
    folder: Path, shape: Shape, most_layers: int, deadline: float = math.inf,
    spare_bytes: int = 0, device: torch.device | str = "cpu",
) -> int:  # fmt: skip
    """Write a random bf16 checkpoint, a shard a layer, and return how many layers it has.

    Those are 2 at least and most_layers at most, and as many as the time and the disk allow.
    """
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(1), dtype=torch.bfloat16)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    first = "model.layers.0."
    layer_shapes = {n.removeprefix(first): s for n, s in shapes.items() if n.startswith(first)}
    weight_map: dict[str, str] = {}

    def write(file: str, wanted: dict[str, torch.Size]) -> None:
        tensors = {
            name: fill(name, torch.empty(shape, dtype=torch.bfloat16, device=device)).cpu()
            for name, shape in wanted.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for name in sorted(shapes.keys() - {first + name for name in layer_shapes}):
        write(f"{name}.safetensors", {name: shapes[name]})
    layers = 0
    while layers < most_layers:
        needed = 2 * shape.layer_params + spare_bytes
        if layers >= 2 and (time.monotonic() > deadline or shutil.disk_usage(folder).free < needed):
            break
        prefix = f"model.layers.{layers}."
        write(f"layer-{layers:02}.safetensors", {prefix + n: s for n, s in layer_shapes.items()})
        layers += 1
    shape.config(layers).save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def into_page_cache(folder: Path) -> None:
    """Read all of a folder's files, so that the system holds them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
