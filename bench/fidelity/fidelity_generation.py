"""Greedy continuations of held-out text by a pruned model beside the dense one's.

A KL is of single tokens after a dense text; here each model goes on from its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 64, 64
BATCH = 16


class Continuations:
    """The dense model's continuations of the first tokens of windows (N, T), made once."""

    def __init__(self, dense: PreTrainedModel, windows: Tensor) -> None:
        self._prompts = windows[:PROMPTS, :PROMPT_TOKENS]
        self._dense = greedy(dense, self._prompts)

    def compare(self, pruned: PreTrainedModel) -> dict[str, Any]:
        """Return how far a pruned model's continuations are the dense model's.

        `common_prefix` is the mean number of tokens before the first that differs, `equal_tokens`
        the share of all tokens that are the same at the same place.
        """
        same = greedy(pruned, self._prompts) == self._dense
        return {
            "prompts": len(self._prompts),
            "prompt_tokens": self._prompts.shape[1],
            "new_tokens": same.shape[1],
            "common_prefix": float(same.cumprod(dim=1).sum(dim=1).double().mean()),
            "equal_tokens": float(same.double().mean()),
        }


def greedy(model: PreTrainedModel, prompts: Tensor) -> Tensor:
    """Return (N, NEW_TOKENS) of the most likely next tokens, past the end of a text too.

    The model's own generation settings, such as a penalty or where to end, are gone afterwards.
    """
    # `generate` takes from the model's settings what those that it is given leave open.
    plain = model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS)
    parts = []
    for batch in prompts.split(BATCH):
        every = torch.ones_like(batch)
        found = model.generate(batch, attention_mask=every, generation_config=plain)
        parts.append(found[:, batch.shape[1] :])
    return torch.cat(parts)
