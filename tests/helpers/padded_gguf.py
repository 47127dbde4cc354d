"""A GGUF file as llama.cpp's converter writes it of a padded model."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from uneven import WIDTHS


def padded_gguf(
    file: Path, architecture: str, *, tied: bool = True, more: str = ""
) -> dict[str, Any]:
    """Write a GGUF file as llama.cpp's converter does of a padded model; return its tensors."""
    rng = np.random.default_rng(0)
    D, F, heads, kv, V = 16, 96, 4, 2, 40
    shapes = {"attn_q.weight": (D, D), "attn_k.weight": (D // 2, D), "attn_v.weight": (D // 2, D)}
    shapes |= {"ffn_gate.weight": (F, D), "ffn_up.weight": (F, D), "ffn_down.weight": (D, F)}
    shapes |= {"attn_norm.weight": (D,)}
    if architecture == "qwen2":
        shapes |= {"attn_q.bias": (D,), "attn_k.bias": (D // 2,)}
    tensors = {"token_embd.weight": rng.standard_normal((V, D)).astype(np.float16)}
    if more:
        tensors[more] = np.zeros(F, dtype=np.float32)
    if not tied:
        tensors["output.weight"] = rng.standard_normal((V, D)).astype(np.float16)
    for layer, width in enumerate(WIDTHS):
        for name, shape in shapes.items():
            kind = np.float32 if len(shape) == 1 else np.float16
            tensor = rng.standard_normal(shape).astype(kind)
            if name.startswith("ffn_down"):
                tensor[:, width:] = 0
            elif name.startswith("ffn"):
                tensor[width:] = 0
            tensors[f"blk.{layer}.{name}"] = tensor
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(len(WIDTHS))
    writer.add_feed_forward_length(F)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_token_list(["a", "b"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
