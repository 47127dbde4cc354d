"""The fingerprint of a checkpoint: equal for equal configurations and weights, however saved."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from hfprune_fast.checkpoint.pretrained import own_fields
from hfprune_fast.checkpoint.safetensors import ITEM_BYTES

_FINGERPRINT_ROWS = 16
# What changes nothing that a model computes, or is known from the shapes of its tensors.
_MEANS_NOTHING = {"initializer_range", "use_cache", "pretraining_tp", "attention_dropout"}
_MEANS_NOTHING |= {"bos_token_id", "eos_token_id", "pad_token_id"}
_MEANS_NOTHING |= {"intermediate_size", "shared_intermediate_size", "mlp_widths"}
_MEANS_NOTHING |= {"moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"}
_MEANS_NOTHING |= {"num_experts", "num_local_experts", "n_routed_experts"}
_MEANS_NOTHING |= {"tie_word_embeddings", "block_auto_adjust_ff_dim"}
# In `sliding_window` and `layer_types`, which follow from them.
_MEANS_NOTHING |= {"use_sliding_window", "max_window_layers"}


def fingerprint_of(family: str, config: Any, samples: Mapping[str, bytes]) -> str:
    """Return a sha256 over a family, what a transformers config means for it, and samples."""
    names = own_fields(type(config)) - _MEANS_NOTHING
    meaning = {name: _normal(value) for name, value in vars(config).items() if name in names}
    if set(meaning.get("layer_types") or ()) == {"full_attention"}:
        del meaning["layer_types"]
    meaning = {name: value for name, value in meaning.items() if value not in (None, False)}
    digest = hashlib.sha256(json.dumps({"family": family, **meaning}, sort_keys=True).encode())
    for name, sample in sorted(samples.items()):
        digest.update(f"{name}\n".encode() + sample)
    return digest.hexdigest()


def _normal(value: Any) -> Any:
    """Return a value of a configuration, the same however versions of transformers write it."""
    if isinstance(value, dict):  # rope_parameters, where `type` is the old name of rope_type
        return {k: _normal(v) for k, v in value.items() if v is not None and k != "type"}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 2**53 else value


def sample_of(dtype: str, shape: tuple[int, ...], data: memoryview) -> bytes:
    """Return the digest of a tensor's dtype, shape and a sample of it.

    The sample is 16 rows of a matrix, evenly spaced from the first to the last, and all of a
    vector: enough to tell a fine-tuned sibling apart without reading the whole checkpoint.
    """
    digest = hashlib.sha256(f"{dtype} {shape}".encode())
    rows: Iterable[int] = [0]
    row_bytes = len(data)
    if len(shape) >= 2 and shape[0] > 0:
        row_bytes //= shape[0]
        rows = _sampled(shape[0])
    for row in rows:
        digest.update(data[row * row_bytes : (row + 1) * row_bytes])
    return digest.digest()


def sample_of_rows(dtypes: Sequence[str], columns: int, parts: Sequence[memoryview]) -> bytes:
    """Return the digest of sampled rows of matrices that stand one below the other.

    Args:
        dtypes: of each matrix.
        columns: of all of them.
        parts: their data.
    """
    digest = hashlib.sha256(f"{' '.join(sorted(set(dtypes)))} {columns}".encode())
    row_bytes = [columns * ITEM_BYTES[dtype] for dtype in dtypes]
    ends = list(accumulate(len(part) // of for part, of in zip(parts, row_bytes, strict=True)))
    digest.update(f"{ends[-1]}".encode())
    for row in _sampled(ends[-1]):
        part = bisect_right(ends, row)
        begin = (row - (ends[part - 1] if part else 0)) * row_bytes[part]
        digest.update(parts[part][begin : begin + row_bytes[part]])
    return digest.digest()


def _sampled(rows: int) -> list[int]:
    """Return the rows of so many that are sampled: 16, evenly spaced from the first to the last."""
    last = rows - 1
    return sorted({last * i // (_FINGERPRINT_ROWS - 1) for i in range(_FINGERPRINT_ROWS)})
