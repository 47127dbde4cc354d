"""Models with the vocabulary of the shipped tokenizer, and checkpoints of any size."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from truth import tiny_model

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.pretrained import load_tokenizer


def random_llama(**overrides: Any) -> PreTrainedModel:
    """A random fp32 Llama of 3 layers x 96 neurons."""
    vocab = len(load_tokenizer(TINY_MODEL))
    return tiny_model("llama", dtype=torch.float32, **{"vocab_size": vocab, **overrides})


def synthetic_checkpoint(
    folder: Path, *, hidden: int, width: int, layers: int, vocab: int, heads: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:  # fmt: skip
    """Write a random Llama, a shard a layer, without building it; return the folder."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": width, "num_hidden_layers": layers, "vocab_size": vocab,
        "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)

    square, tall = (hidden, hidden), (width, hidden)
    layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": tall, "mlp.up_proj": tall, "mlp.down_proj": tall[::-1]}
    norms = ("input_layernorm", "post_attention_layernorm")
    weight_map, total = {}, 0
    for i in range(layers + 1):
        prefix = f"model.layers.{i}."
        if i < layers:
            tensors = {f"{prefix}{name}.weight": weight(*shape) for name, shape in layer.items()}
            tensors |= {f"{prefix}{name}.weight": torch.ones(hidden, dtype=dtype) for name in norms}
        else:
            tensors = {
                n: weight(vocab, hidden) for n in ("model.embed_tokens.weight", "lm_head.weight")
            }
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
        file = f"model-{i + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    metadata = {"total_size": total, "total_parameters": total // dtype.itemsize, "note": "kept"}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
