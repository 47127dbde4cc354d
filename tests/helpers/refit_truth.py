"""A refit of one matrix, by lstsq on rows above a ridge."""

import torch
from torch import Tensor

from hfprune_fast.scoring.obs import REFIT_RIDGE


def plain_fit(acts: Tensor, wanted: Tensor, down: Tensor) -> Tensor:
    """Return V (D, K) of least ‖acts Vᵀ - wanted‖² + λ ‖V - down‖², λ as the refit has it."""
    pull = (REFIT_RIDGE * acts.square().mean(0).mean() * len(acts)).sqrt()
    ridge = pull * torch.eye(acts.shape[1], dtype=torch.float64)
    solution: Tensor = torch.linalg.lstsq(
        torch.cat([acts, ridge]), torch.cat([wanted, pull * down.t()])
    ).solution
    return solution.t()
