"""Tables that need no data: the norm of a neuron's weights, or random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.models.sites import site_slices, table_shape
from hfprune_fast.scoring.moments import column_norms
from hfprune_fast.scoring.table import ImportanceTable


def data_free_table(source: ModelSource, criterion: str, seed: int = 0) -> ImportanceTable:
    """Return a table of criterion "magnitude" or "random"; only the latter uses the seed."""
    spec = source.spec
    provenance: dict[str, Any] = {"criteria": [criterion], "model": source.name}
    provenance["model_fingerprint"] = source.fingerprint
    if criterion == "magnitude":
        return ImportanceTable({"weight_norm": weight_norms(source)}, spec, provenance)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(table_shape(spec.sites), dtype=torch.float64, generator=generator)
    statistics = {"uniform": drawn}
    return ImportanceTable(statistics, spec, {**provenance, "seed": seed})


def weight_norms(source: ModelSource) -> Tensor:
    """Return (L, F) or (N,) the 2-norm of each neuron's weights: gate, up and down."""
    spec = source.spec
    slices = site_slices(spec.sites)
    squares = torch.zeros(table_shape(spec.sites), dtype=torch.float64)
    for name in source.tensors:
        place = source.place_of(name)
        if place is None or place.axis is None or "bias" in name.rpartition(".")[2]:
            continue
        weight = source.read(name)
        parts = weight if place.of_all else weight[None]
        for number, part in enumerate(parts):
            norms = column_norms(part if place.axis == 1 else part.t()).square()
            by_neuron = norms.view(-1, 2) if place.paired else norms.view(place.times, -1).t()
            expert = number if place.of_all else place.expert
            site = place.layer if expert is None else (place.layer, expert)
            squares.view(-1)[slices[site]] += by_neuron.sum(dim=1)
    return squares.sqrt()
