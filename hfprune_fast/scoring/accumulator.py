"""The sums of a scoring run so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.errors import NumericsError
from hfprune_fast.kernels import TaylorStatistics
from hfprune_fast.models.sites import SiteKey, site_slices


@dataclass(frozen=True)
class ScoreAccumulator:
    """Sums over the sequences that have been scored.

    A table is (L, F), or (N,) with experts, see `site_slices`; E all experts of all layers.
    """

    # (C, 4, table) fp64: of each criterion, in the order of TaylorStatistics; with parity in the
    # model's dtype. Without any criterion C is 1 and only act is added up.
    statistics: Tensor
    down_norm: Tensor  # (table) fp64: 2-norm of each neuron's down_proj column; 0 before any pass
    # (G, D, D) fp32: Σ g gᵀ at the outputs of each layer's own MLP and of its experts; on the CPU,
    # or on the device (`engine.plan.Plan.streams_on_device`).
    output_fisher: Tensor | None = None
    # (3 + C, E) fp64: of each expert Σ w·‖y‖, tokens, Σ w, and its Taylor term of each criterion.
    experts: Tensor | None = None
    samples: int = 0
    tokens: int = 0
    loss_nats: tuple[float, ...] = ()  # of each criterion, the sum over the sequences

    def gradient_overflowed(self) -> bool:
        """Whether the statistics hold NaN or inf although the losses are finite."""
        losses_finite = all(map(math.isfinite, self.loss_nats))
        return losses_finite and not bool(self.statistics.isfinite().all())

    def check_finite(self, widths: Mapping[SiteKey, int]) -> None:
        """Raise NumericsError that names where NaN or inf appeared first in a pass.

        A pass runs forward through the layers, then the head, then back.
        """
        finite = self.statistics.isfinite().all(dim=0).flatten(1)
        if bool(finite.all()) and all(map(math.isfinite, self.loss_nats)):
            return
        bad_acts, bad = [], []
        for site, part in site_slices(widths).items():
            layer = site if isinstance(site, int) else site[0]
            of_site = TaylorStatistics(*finite[:, part].all(dim=1))
            bad_acts += [] if bool(of_site.act) else [layer]
            bad += [] if bool(torch.stack(of_site).all()) else [layer]
        if bad_acts:
            where = f"MLP activations of layer {bad_acts[0]}"
        elif not all(map(math.isfinite, self.loss_nats)):
            where = "logits, after finite MLP activations"
        else:  # the backward visits the last layer first
            where = f"gradient at the MLP of layer {bad[-1]}"
        raise NumericsError(f"NaN or inf in the {where}; try float32")
