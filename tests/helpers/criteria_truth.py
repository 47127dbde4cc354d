"""What the criteria must give, in float64, and small inputs for them."""

from typing import Any

import torch
from rows_truth import in_lanes
from torch import Tensor
from transformers import PreTrainedModel

from hfprune_fast.data.batches import MicroBatch, numbered
from hfprune_fast.kernels._philox import uniform

SEED = 5


def ids_of(model: PreTrainedModel, samples: int = 5, seq_len: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (samples, seq_len), generator=generator)


def in_batches(ids: Tensor, size: int = 2) -> list[MicroBatch]:
    parts = ids.split(size)
    return numbered(MicroBatch(part, (part.shape[1],) * len(part)) for part in parts)


def mean_entropy(logits: Tensor, ids: Tensor, number: int) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def next_token(logits: Tensor, ids: Tensor, number: int) -> Tensor:
    return -logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).mean()


def drawn_token(logits: Tensor, ids: Tensor, number: int) -> Tensor:
    return -logits.log_softmax(-1).gather(1, drawn(logits.detach(), number)[:, None]).mean()


def drawn(logits: Tensor, number: int) -> Tensor:
    """The token at each position whose share of the distribution the row's number falls into."""
    rows = (number << 24) + torch.arange(len(logits))
    order = in_lanes(logits.shape[1])
    above = logits.softmax(-1)[:, order].cumsum(-1) > uniform(rows, SEED, torch.float64)[:, None]
    return order[above.int().argmax(-1)]


def self_distilled(logits: Tensor, ids: Tensor, number: int) -> Tensor:
    """Of alpha 0.4 and temperature 0.5; the last position has no next token and no divergence."""
    log_p = logits[:-1].log_softmax(-1)
    log_r = (logits[:-1].detach() / 0.5).log_softmax(-1)
    kl = (log_r.exp() * (log_r - log_p)).sum(-1)
    return 0.6 * next_token(logits, ids, number) + 0.4 * kl.mean()


# Its loss, and what a table calls it.
TRUTHS: dict[str, tuple[Any, str]] = {
    "entropy": (mean_entropy, "entropy_nats"),
    "cross_entropy": (next_token, "cross_entropy_nats"),
    "fisher": (drawn_token, "sampled_cross_entropy_nats"),
    "self_distillation": (self_distilled, "self_distillation_nats"),
}
