"""Tables that need no data: the norm of a neuron's weights, or random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.scoring.passes import column_norms
from hfprune_fast.scoring.table import ImportanceTable


def data_free_table(source: ModelSource, criterion: str, seed: int = 0) -> ImportanceTable:
    """Return a table of criterion "magnitude" or "random"; only the latter uses the seed."""
    spec = source.spec
    provenance: dict[str, Any] = {"criteria": [criterion], "model": source.name}
    provenance["model_fingerprint"] = source.fingerprint
    if criterion == "magnitude":
        return ImportanceTable({"weight_norm": weight_norms(source)}, spec, provenance)
    generator = torch.Generator().manual_seed(seed)
    shape = spec.num_layers, spec.intermediate_size
    statistics = {"uniform": torch.rand(shape, dtype=torch.float64, generator=generator)}
    return ImportanceTable(statistics, spec, {**provenance, "seed": seed})


def weight_norms(source: ModelSource) -> Tensor:
    """Return (L, F) the 2-norm of each neuron's weights: gate and up row and down column."""
    squares = torch.zeros(source.spec.num_layers, source.spec.intermediate_size).double()
    for name in source.tensors:
        place = source.place_of(name)
        if place is not None and name.endswith(".weight"):
            weight = source.read(name)
            norms = column_norms(weight if place.axis == 1 else weight.t()).square()
            norms = norms.view(place.times, -1).sum(dim=0)
            squares[place.layer, : len(norms)] += norms
    return squares.sqrt()
