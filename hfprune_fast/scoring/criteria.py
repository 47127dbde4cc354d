"""The criteria that a model is scored by, one entry each.

The loss of a sequence is the mean over its positions of what the criterion says about the model's
output distribution p there:

    entropy         H(p), the paper's
    cross_entropy   -log p(y), y the next token; the last position has none
    fisher          -log p(y), y drawn from p: its gradient's second moments are those of the
                    Fisher information, so half of them is the second-order KL(dense || pruned)
    self_distillation  0.6 · -log p(y), y the next token, + 0.4 · KL(r || p), where r, the teacher,
                    is p at temperature 0.5: SDMPrune's loss at the dense model
    activation      none: only act is added up, and nothing is differentiated

To add a criterion, write its head loss, add an entry to CRITERIA here and its name to CRITERIA in
`config/pruning.py`; docs/add-a-criterion.md lists the other steps. A head loss takes h (R, D) after
the final norm, R = B·T rows with the padding; the head's weight (V, D); row_weights (R,) fp64; the
batch, for its labels; the seed; and the kernels' other options. It returns the weighted sum of the
rows' losses, and its gradient (R, D) at h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.kernels import (
    linear_cross_entropy,
    linear_entropy,
    linear_fisher,
    linear_self_distillation,
)

Loss = tuple[Tensor, Tensor]


def _entropy(
    h: Tensor, weight: Tensor, row_weights: Tensor, batch: MicroBatch, seed: int, **options: Any
) -> Loss:
    return linear_entropy(h, weight, row_weights, **options)


def _cross_entropy(
    h: Tensor, weight: Tensor, row_weights: Tensor, batch: MicroBatch, seed: int, **options: Any
) -> Loss:
    labels = batch.labels.flatten().to(h.device)
    return linear_cross_entropy(h, weight, labels, row_weights, **options)


def _fisher(
    h: Tensor, weight: Tensor, row_weights: Tensor, batch: MicroBatch, seed: int, **options: Any
) -> Loss:
    row_ids = batch.row_ids.flatten().to(h.device)
    return linear_fisher(h, weight, row_ids, row_weights, seed=seed, **options)


def _self_distillation(
    h: Tensor, weight: Tensor, row_weights: Tensor, batch: MicroBatch, seed: int, **options: Any
) -> Loss:
    labels = batch.labels.flatten().to(h.device)
    return linear_self_distillation(h, weight, labels, row_weights, **options)


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Args:
        default_statistic: what ranks its scores unless another statistic is requested: for entropy
            the paper's, for the others the best in bench/results/fidelity.
        head_loss: its loss and gradient at the head; None if it needs no gradient.
        loss_name: the name in a table's provenance of the mean of the sequences' losses.
        unlabelled: positions at the end of each sequence that have no loss.
        draws: whether it draws tokens, so that the scores depend on the seed.
    """

    default_statistic: str
    head_loss: Callable[..., Loss] | None = None
    loss_name: str = ""
    unlabelled: int = 0
    draws: bool = False

    def row_weights(
        self, batch: MicroBatch, token_mask: Tensor | None, device: torch.device
    ) -> Tensor:
        """Return (B, T) fp64 weights that make a row's loss its share of its sequence's mean."""
        shares = [1 / max(1, length - self.unlabelled) for length in batch.lengths]
        weights = torch.tensor(shares, dtype=torch.float64)[:, None]
        weights = weights.expand(batch.ids.shape).to(device)
        return weights if token_mask is None else weights * token_mask


CRITERIA: dict[str, Criterion] = {
    "entropy": Criterion("l1", _entropy, "entropy_nats"),
    "cross_entropy": Criterion("l2", _cross_entropy, "cross_entropy_nats", unlabelled=1),
    "fisher": Criterion("l2", _fisher, "sampled_cross_entropy_nats", draws=True),
    "self_distillation": Criterion(
        "l2", _self_distillation, "self_distillation_nats", unlabelled=1
    ),
    "activation": Criterion("act"),
}
