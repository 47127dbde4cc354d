"""Where the tensors of a checkpoint hold neurons and experts, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hfprune_fast.models.families import Experts, Family


@dataclass(frozen=True)
class Place:
    """What a tensor of a checkpoint holds of a layer's neurons or experts.

    Args:
        layer: the layer.
        axis: of the neurons; in a tensor `of_all`, within an expert's part of it. None where there
            are none.
        times: how often each neuron is there, one block after the other: 2 where gate and up are.
        paired: each neuron is there twice, side by side.
        expert: the one that the tensor is of; None for the layer's own MLP.
        of_all: the first axis is the layer's experts.
    """

    layer: int
    axis: int | None = None
    times: int = 1
    paired: bool = False
    expert: int | None = None
    of_all: bool = False


def place_of(family: Family, name: str) -> Place | None:
    """Return what a tensor, named as below the decoder in files, holds; None if it is not cut.

    down_proj's bias is not cut, but where it has an entry for each expert.
    """
    match = re.fullmatch(rf"{re.escape(family.layers)}\.(\d{{1,4}})\.(.+)", name)
    if match is None:
        return None
    layer, name = int(match[1]), match[2]
    experts = family.experts
    if experts is not None:
        place = _of_experts(family, experts, layer, name)
        if place is not None:
            return place
    path, _, leaf = name.rpartition(".")
    for site in (family.site, *([experts.shared] if experts and experts.shared else [])):
        if path in (site.gate, site.up) and leaf in ("weight", "bias"):
            return Place(layer, 0, times=2 if site.gate == site.up else 1)
        if (path, leaf) == (site.down, "weight"):
            return Place(layer, 1)
    return None


def _of_experts(family: Family, experts: Experts, layer: int, name: str) -> Place | None:
    below = re.escape(stored_name(family, f"{experts.path}."))
    one = re.fullmatch(rf"{below}(\d{{1,4}})\.(.+)", name)
    if one is not None and one[2] in experts.stored:
        return Place(layer, int(one[2] == experts.stored[2]), expert=int(one[1]))
    if any(name in (each, stored_name(family, each)) for each in experts.per_expert):
        return Place(layer, of_all=True)
    across = experts.transposed
    holding = {
        "gate_up_proj": Place(layer, int(across), 1 if across else 2, across, of_all=True),
        "gate_up_proj_bias": Place(layer, 0, 1 if across else 2, across, of_all=True),
        "down_proj": Place(layer, int(not across), of_all=True),
        "down_proj_bias": Place(layer, of_all=True),
    }
    for leaf, place in holding.items():
        ours = f"{experts.path}.{leaf}"
        if name in (ours, stored_name(family, ours)):
            return place
    return None


def renumbered(name: str, expert: int, number: int) -> str:
    """Return what a tensor of one expert is called when the expert gets another number."""
    before, _, after = name.rpartition(f".{expert}.")
    return f"{before}.{number}.{after}"


def stored_name(family: Family, name: str) -> str:
    """Return what a tensor, or the beginning of its name below a layer, is called in files."""
    for ours, theirs in family.renamed.items():
        name = name.replace(ours, theirs)
    return name


def stored_candidates(family: Family, name: str, count: int) -> Iterator[tuple[str, ...]]:
    """Yield what may hold a parameter in files: one tensor, or several side by side.

    Args:
        name: as below a layer.
        count: of the layer's experts.
    """
    yield (name,)
    yield (stored_name(family, name),)
    experts = family.experts
    if experts is None or experts.transposed or not name.startswith(f"{experts.path}."):
        return
    gate, up, down = experts.stored
    leaves = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(name.rpartition(".")[2], ())
    path = stored_name(family, f"{experts.path}.")
    yield tuple(f"{path}{e}.{leaf}" for e in range(count) for leaf in leaves)
