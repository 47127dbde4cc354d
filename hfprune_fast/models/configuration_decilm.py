"""The configuration of a checkpoint in DeciLM's layout, which vLLM reads with its own code.

hfprune_fast puts a copy of this file into such a checkpoint. transformers has no class for
model_type nemotron-nas, so tools load this one from the folder, with remote code allowed. It
imports nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A layer's entry of block_configs: JSON, and read by attribute as vLLM does."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """A Llama's configuration with an entry for each layer."""

    model_type = "nemotron-nas"
    block_configs: list[Any] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs":
            value = [Block(block) for block in value or ()]
        super().__setattr__(name, value)  # type: ignore[no-untyped-call]
