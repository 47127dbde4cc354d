"""The criteria that a model is scored by, one entry each.

The loss of a sequence is the mean over its positions of what the criterion says about the model's
output distribution p there:

    entropy         H(p), the paper's
    cross_entropy   -log p(y), y the next token; the last position has none
    fisher          -log p(y), y drawn from p: its gradient's second moments are those of the
                    Fisher information, so half of them is the second-order KL(dense || pruned)
    activation      none: only act is added up, and nothing is differentiated

To add a criterion, write its head loss and add an entry to CRITERIA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.kernels import linear_cross_entropy, linear_entropy, linear_fisher


@dataclass(frozen=True)
class HeadRows:
    """What a head loss is made of: the R = B·T rows of a micro-batch, padding included."""

    hidden: Tensor  # (R, D), after the final norm
    weight: Tensor  # (V, D), the head's
    row_weights: Tensor  # (R,) fp64
    batch: MicroBatch  # for its labels or row ids
    seed: int
    options: Mapping[str, Any]  # bias, grad_scale, logits_budget_bytes, backend

    def on_device(self, positions: Tensor) -> Tensor:
        """Return (B, T) values as (R,) on the device of the rows."""
        return positions.flatten().to(self.hidden.device)


# Returns the weighted sum of the rows' losses, and its gradient (R, D) at `hidden`.
HeadLoss = Callable[[HeadRows], tuple[Tensor, Tensor]]


def _entropy(rows: HeadRows) -> tuple[Tensor, Tensor]:
    return linear_entropy(rows.hidden, rows.weight, rows.row_weights, **rows.options)


def _cross_entropy(rows: HeadRows) -> tuple[Tensor, Tensor]:
    labels = rows.on_device(rows.batch.labels)
    return linear_cross_entropy(rows.hidden, rows.weight, labels, rows.row_weights, **rows.options)


def _fisher(rows: HeadRows) -> tuple[Tensor, Tensor]:
    row_ids = rows.on_device(rows.batch.row_ids)
    return linear_fisher(
        rows.hidden, rows.weight, row_ids, rows.row_weights, seed=rows.seed, **rows.options
    )


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Args:
        default_statistic: what its scores are ranked by unless another statistic is requested: for
            entropy the paper's, for the others the best in bench/results/fidelity.
        head_loss: its loss and gradient at the head; None if it needs no gradient.
        loss_name: the name in a table's provenance of the mean of the sequences' losses.
        unlabelled: positions at the end of each sequence that have no loss.
        draws: whether it draws tokens, so that the scores depend on the seed.
    """

    default_statistic: str
    head_loss: HeadLoss | None = None
    loss_name: str = ""
    unlabelled: int = 0
    draws: bool = False

    def row_weights(
        self, batch: MicroBatch, token_mask: Tensor | None, device: torch.device
    ) -> Tensor:
        """Return (B, T) fp64 weights that make a row's loss its share of its sequence's mean."""
        weights = torch.tensor(
            [1 / max(1, length - self.unlabelled) for length in batch.lengths], dtype=torch.float64
        )
        weights = weights[:, None].expand(batch.ids.shape).to(device)
        return weights if token_mask is None else weights * token_mask


CRITERIA: dict[str, Criterion] = {
    "entropy": Criterion("l1", _entropy, "entropy_nats"),
    "cross_entropy": Criterion("l2", _cross_entropy, "cross_entropy_nats", unlabelled=1),
    "fisher": Criterion("l2", _fisher, "sampled_cross_entropy_nats", draws=True),
    "activation": Criterion("act"),
}
