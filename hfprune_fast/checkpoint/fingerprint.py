"""The fingerprint of a checkpoint: equal for equal configurations and weights, however sharded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from hfprune_fast.checkpoint.safetensors import SafetensorsFile

_FINGERPRINT_ROWS = 16
# What changes when a checkpoint is saved again, but not what it computes.
_CONFIG_NOT_IN_FINGERPRINT = {"_name_or_path", "auto_map", "transformers_version", "use_cache"}


def fingerprint_of(config: Mapping[str, Any], shards: Iterable[SafetensorsFile]) -> str:
    """Return a sha256 over a configuration and a sample of every tensor of some shards.

    The sample is 16 rows of each matrix, evenly spaced from the first to the last, and all of each
    vector: enough to tell a fine-tuned sibling apart without reading the whole checkpoint.
    """
    digest = hashlib.sha256()
    meaning = {k: v for k, v in config.items() if k not in _CONFIG_NOT_IN_FINGERPRINT}
    digest.update(json.dumps(meaning, sort_keys=True).encode())
    samples = {
        name: _sample(dtype, shape, shard.data(name, prefetch=False))
        for shard in shards
        for name, (dtype, shape, _, _) in shard.tensors.items()
    }
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
