"""transformers computes norms and rotary tables in fp32 even in a float64 model; this undoes it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel


def make_float64_exact(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put float64 norms and rotary angles into the model's classes until the test ends."""

    def norm(self: Any, h: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(h, h.shape[-1:], self.weight, self.variance_epsilon)

    def rope(self: Any, h: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        head_dim = 2 * len(self.inv_freq)
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=h.device) / head_dim
        angles = position_ids[..., None] / self.config.rope_parameters["rope_theta"] ** pairs
        return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)

    monkeypatch.setattr(type(model.model.norm), "forward", norm)
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", rope)
