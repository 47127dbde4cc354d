"""What the tensors of a checkpoint's files are called, and how many layers they hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune_fast.checkpoint.folder import TensorInfo
from hfprune_fast.errors import CheckpointError
from hfprune_fast.models.families import Family
from hfprune_fast.models.tensors import place_of, stored_candidates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODER = "model."  # begins the names of the decoder's parameters in the model that is run


def names_in_files(
    skeleton: PreTrainedModel,
    family: Family,
    prefix: str,
    head: str,
    stored: Collection[str],
    count: int,
) -> dict[str, tuple[str, ...]]:
    """Return {name in the model that is run: names in the checkpoint} of all its tensors.

    Args:
        stored: the names of the checkpoint's tensors.
        count: of a layer's experts.
    """
    names: dict[str, tuple[str, ...]] = {}
    for ours in skeleton.state_dict():
        below = re.fullmatch(rf"{re.escape(DECODER + family.layers)}\.(\d+)\.(.+)", ours)
        if below is not None:
            layer = f"{prefix}{family.layers}.{below[1]}."
            candidates = [
                tuple(f"{layer}{name}" for name in each)
                for each in stored_candidates(family, below[2], count)
            ]
            held = (each for each in candidates if all(name in stored for name in each))
            names[ours] = next(held, candidates[-1])
        elif ours.startswith(DECODER):
            names[ours] = (f"{prefix}{ours.removeprefix(DECODER)}",)
        else:
            names[ours] = (ours.replace(family.head, head.removesuffix(".weight"), 1),)
    return names


def held_across(
    family: Family,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, TensorInfo],
) -> frozenset[str]:
    """Return the tensors of all experts whose last two axes files hold the other way round.

    A square one is as the model has it: that is how transformers reads it.

    Args:
        shapes: {tensor of the files: its shape as the model has it}.
    """
    if family.experts is None or not family.experts.across:
        return frozenset()
    return frozenset(
        name
        for name, shape in shapes.items()
        for place in [place_of(family, name.removeprefix(prefix))]
        if place is not None and place.of_all and place.axis is not None
        if name in tensors and shape != tensors[name].shape == swapped(shape)
    )


def swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape whose last two axes have changed places."""
    return (*shape[:-2], shape[-1], shape[-2])


def shape_of_one(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the shape of each of `count` matrices that are a parameter, side by side."""
    return shape if count == 1 else (prod(shape[:-1]) // count, shape[-1])


def prefix_and_head(family: Family, tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """Return how the names of the decoder's tensors begin in files, and the head's weight's."""
    tower = family.tower
    prefixes = (DECODER, "") if tower is None else tower.stored
    heads = (family.head,) if tower is None else tower.stored_heads
    first = f"{family.layers}.0."
    down = f"{first}{family.site.down}.weight"
    found = [p for p in prefixes if f"{p}{down}" in tensors]
    if not found and family.experts is not None:  # the first layer may have no MLP of its own
        found = [p for p in prefixes if any(name.startswith(f"{p}{first}") for name in tensors)]
    prefix = (found or prefixes)[0]
    head = next((h for h in heads if f"{h}.weight" in tensors), heads[0])
    return prefix, f"{head}.weight"


def check_layers(
    folder: Path, prefix: str, tensors: Mapping[str, TensorInfo], declared: int
) -> None:
    """Refuse a number of layers that the files do not hold, before as many are made."""
    numbers = {
        name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)
    }
    if declared > len(numbers):
        raise CheckpointError(
            f"{folder}/config.json has num_hidden_layers {declared}, but its files hold "
            f"{len(numbers)} layers, named {prefix}0 and so on"
        )
