"""Models whose layers have MLPs of different widths: the family's own classes, narrowed.

hfprune_fast puts a copy of this file into such a checkpoint as `modeling_hfprune.py`, from where
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` takes it. So it imports
nothing but transformers. `import hfprune_fast` makes the same classes known without remote code.

config.json has the width of each layer in `mlp_widths`; `intermediate_size` is the widest. The
`model_type` is not the family's, so that nothing takes the checkpoint for a uniform one.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class _OwnWidths:
    """What is put before a family's ForCausalLM to give each layer's MLP its width."""

    _auto_class: Any = "AutoModelForCausalLM"  # has save_pretrained ship this file

    def __init__(self, config: PreTrainedConfig) -> None:
        widths, widest = config.mlp_widths, config.intermediate_size
        if widths is None:
            widths = [widest] * config.num_hidden_layers
        if len(widths) != config.num_hidden_layers or not 1 <= min(widths) <= max(widths) <= widest:
            raise ValueError(
                f"mlp_widths must have a width in 1..{widest} for each of the "
                f"{config.num_hidden_layers} layers, got {widths}"
            )
        super().__init__(config)  # type: ignore[call-arg]
        for layer, width in zip(self.model.layers, widths, strict=True):  # type: ignore[attr-defined]
            if width != widest:
                narrow = copy.copy(config)
                narrow.intermediate_size = width
                layer.mlp = type(layer.mlp)(narrow)
        self.post_init()  # type: ignore[attr-defined]  # gives new weights the family's values


class HFPruneLlamaConfig(LlamaConfig):
    model_type = "hfprune_llama"
    _auto_class = "AutoConfig"
    mlp_widths: list[int] | None = None


class HFPruneLlamaForCausalLM(_OwnWidths, LlamaForCausalLM):
    config_class = HFPruneLlamaConfig


class HFPruneMistralConfig(MistralConfig):
    model_type = "hfprune_mistral"
    _auto_class = "AutoConfig"
    mlp_widths: list[int] | None = None


class HFPruneMistralForCausalLM(_OwnWidths, MistralForCausalLM):
    config_class = HFPruneMistralConfig


class HFPruneQwen2Config(Qwen2Config):
    model_type = "hfprune_qwen2"
    _auto_class = "AutoConfig"
    mlp_widths: list[int] | None = None


class HFPruneQwen2ForCausalLM(_OwnWidths, Qwen2ForCausalLM):
    config_class = HFPruneQwen2Config


class HFPruneQwen3Config(Qwen3Config):
    model_type = "hfprune_qwen3"
    _auto_class = "AutoConfig"
    mlp_widths: list[int] | None = None


class HFPruneQwen3ForCausalLM(_OwnWidths, Qwen3ForCausalLM):
    config_class = HFPruneQwen3Config
