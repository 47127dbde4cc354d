"""Models with the vocabulary of the shipped tokenizer, so that text can be run through them."""

from typing import Any

import torch
from transformers import PreTrainedModel
from truth import tiny_model

from hfprune_fast.checkpoint import TINY_MODEL
from hfprune_fast.loading import load_tokenizer


def random_llama(**overrides: Any) -> PreTrainedModel:
    """A random fp32 Llama of 3 layers x 96 neurons."""
    vocab = len(load_tokenizer(TINY_MODEL))
    return tiny_model("llama", dtype=torch.float32, **{"vocab_size": vocab, **overrides})
