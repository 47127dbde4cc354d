"""Options of a recovery of twelve steps."""

from typing import Any

SHORT: dict[str, Any] = {
    "seq_len": 32, "tokens": 32 * 24, "batch_tokens": 64, "held_out": 4, "dtype": "float32",
    "device": "cpu", "batch_size": 2, "lora": 4, "learning_rate": 1e-2,
}  # fmt: skip
