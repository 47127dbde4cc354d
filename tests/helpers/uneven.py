"""Layers of different widths for the models of 3 layers x 96 neurons."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hfprune_fast.models.spec import spec_of

WIDTHS = (61, 96, 30)
IDS = torch.arange(40) * 3 % 127


def keep_of(widths: tuple[int, ...] = WIDTHS, dense: int | tuple[int, ...] = 96) -> Any:
    generator = torch.Generator().manual_seed(5)
    dense = (dense,) * len(widths) if isinstance(dense, int) else dense
    return {
        layer: torch.randperm(of, generator=generator)[:width].sort().values
        for layer, (width, of) in enumerate(zip(widths, dense, strict=True))
    }


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[None]).logits[0]  # type: ignore[no-any-return]


def widths_of(model: PreTrainedModel) -> tuple[int, ...]:
    return spec_of(model).widths
