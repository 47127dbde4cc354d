"""The sums of a scoring run so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hfprune_fast.errors import NumericsError
from hfprune_fast.kernels import TaylorStatistics


@dataclass(frozen=True)
class ScoreAccumulator:
    """Sums over the sequences that have been scored."""

    # (C, 4, L, F) fp64: of each criterion, in the order of TaylorStatistics; with parity in the
    # model's dtype. Without any criterion C is 1 and only act is added up.
    statistics: Tensor
    down_norm: Tensor  # (L, F) fp64: 2-norm of each neuron's down_proj column; 0 before any pass
    output_fisher: Tensor | None = None  # (L, D, D) fp32, on the CPU: Σ g gᵀ at the MLPs' outputs
    samples: int = 0
    tokens: int = 0
    loss_nats: tuple[float, ...] = ()  # of each criterion, the sum over the sequences

    def gradient_overflowed(self) -> bool:
        """Whether the statistics hold NaN or inf although the losses are finite."""
        losses_finite = all(map(math.isfinite, self.loss_nats))
        return losses_finite and not bool(self.statistics.isfinite().all())

    def check_finite(self) -> None:
        """Raise NumericsError that names where NaN or inf appeared first in a pass.

        A pass runs forward through the layers, then the head, then back.
        """
        finite = self.statistics.isfinite().all(dim=3).all(dim=0)  # (4, L)
        bad_acts = (~TaylorStatistics(*finite).act).nonzero()
        bad_layers = (~finite.all(dim=0)).nonzero()
        if len(bad_acts):
            where = f"MLP activations of layer {int(bad_acts[0])}"
        elif not all(map(math.isfinite, self.loss_nats)):
            where = "logits, after finite MLP activations"
        elif len(bad_layers):  # the backward visits the last layer first
            where = f"gradient at the MLP of layer {int(bad_layers[-1])}"
        else:
            return
        raise NumericsError(f"NaN or inf in the {where}; try float32")
