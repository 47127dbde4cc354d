"""What a pruned checkpoint's tensors are made of: each a stored one, or what stays of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, tensor

from hfprune_fast.checkpoint.safetensors import ITEM_BYTES
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.sites import SiteKey, rows_of
from hfprune_fast.models.tensors import Place, renumbered


@dataclass(frozen=True)
class Part:
    """What stays of a stored tensor, or of one entry of its first axis.

    Args:
        entry: the number of the entry; None for the whole tensor.
        axis: the axis that is cut.
        kept: the neurons that stay, sorted int64; None for all.
        width: how many neurons there were.
        times, paired: as in `Place`.
    """

    entry: int | None = None
    axis: int = 0
    kept: Tensor | None = field(default=None, compare=False)
    width: int = 0
    times: int = 1
    paired: bool = False

    def rows(self) -> Tensor | None:
        """Return what stays along the axis, sorted int64; None for all. It is made when used."""
        if self.kept is None:
            return None
        return rows_of(self.kept.cpu(), self.width, self.times, self.paired)

    def indices(self) -> Any:
        """Return `rows` as an array."""
        rows = self.rows()
        return None if rows is None else rows.numpy()


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of a pruned checkpoint.

    Args:
        name: its name there.
        stored: the name of the source's tensor.
        dtype: as files name it.
        shape: as written.
        parts: what it is made of: one part, or one for each entry of its first axis.
        by_entry: it is written entry by entry.
        padded_from: its shape before it is filled up with zero neurons; None where it is not.
    """

    name: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = (Part(),)
    by_entry: bool = False
    padded_from: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def written_tensors(
    source: ModelSource, keep: Mapping[SiteKey, Tensor], pad_to: int = 0
) -> Iterator[WrittenTensor]:
    """Yield the tensors of a pruned checkpoint, in the order of the source's.

    Args:
        keep: as `check_keep` returns it. Experts that stay are numbered anew, in their order.
        pad_to: MLPs that have fewer neurons are filled up with zeros to this width.
    """
    experts: dict[int, list[int]] = {}  # of each layer, those that stay
    for site in sorted(site for site in keep if not isinstance(site, int)):
        experts.setdefault(site[0], []).append(site[1])
    numbers = {(n, e): new for n, kept in experts.items() for new, e in enumerate(kept)}
    for name, info in source.tensors.items():
        place = source.place_of(name)
        if place is None:
            yield WrittenTensor(name, name, info.dtype, info.shape)
        elif place.of_all:
            kept = experts[place.layer]
            parts, shape = parts_of_all(place, info.shape, kept, keep)
            if name in source.across and shape[-1] == shape[-2]:
                raise ArgumentError(
                    f"{name} would be {shape[-1]} by {shape[-2]}, whose axes its class could not "
                    "tell apart; choose another width for its experts"
                )
            by_entry = place.axis is not None
            yield WrittenTensor(name, name, info.dtype, shape, parts, by_entry)
        elif place.expert is None:
            part, shape = part_of(place, info.shape, keep[place.layer])
            padded, axis = list(shape), part.axis
            padded[axis] = max(shape[axis], part.times * pad_to)
            from_shape = None if tuple(padded) == shape else shape
            yield WrittenTensor(
                name, name, info.dtype, tuple(padded), (part,), padded_from=from_shape
            )
        elif (place.layer, place.expert) in numbers:
            site = place.layer, place.expert
            part, shape = part_of(place, info.shape, keep[site])
            new = renumbered(name, place.expert, numbers[site])
            yield WrittenTensor(new, name, info.dtype, shape, (part,))


def part_of(
    place: Place, shape: tuple[int, ...], kept: Tensor, entry: int | None = None
) -> tuple[Part, tuple[int, ...]]:
    """Return what stays of a tensor, or of an entry of this shape, and its shape then."""
    axis, times = place.axis or 0, 2 if place.paired else place.times
    part = Part(entry, axis, kept, shape[axis] // times, place.times, place.paired)
    return part, (*shape[:axis], times * len(kept), *shape[axis + 1 :])


def parts_of_all(
    place: Place, shape: tuple[int, ...], experts: list[int], keep: Mapping[SiteKey, Tensor]
) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    """Return the parts of a tensor whose first axis is a layer's experts, and its new shape."""
    if place.axis is None:  # of the router, a bias: small, and cut at once
        kept = tensor(experts)
        return (Part(None, 0, kept, shape[0]),), (len(experts), *shape[1:])
    cuts = [part_of(place, shape[1:], keep[place.layer, e], entry=e) for e in experts]
    return tuple(part for part, _ in cuts), (len(experts), *cuts[0][1])


def stored_down_projs(
    source: ModelSource, weights: Mapping[SiteKey, Tensor], keep: Mapping[SiteKey, Tensor]
) -> dict[str | tuple[str, int], Tensor]:
    """Return down projections as `Writing` replaces them, in the dtype that each is stored in.

    Args:
        weights: {site: (D, K)}.
        keep: as `check_keep` returns it, by which experts are numbered anew.
    """
    replaced: dict[str | tuple[str, int], Tensor] = {}
    for site, weight in weights.items():
        if isinstance(site, int):
            name = source.down_proj(site)
            replaced[name] = weight.to(source.dtype_of(name))
            continue
        layer, expert = site
        new = sum((layer, e) in keep for e in range(expert))
        names = source.expert_down_proj(layer, expert)
        if isinstance(names, str):
            replaced[renumbered(names, expert, new)] = weight.to(source.dtype_of(names))
            continue
        stored, _ = names
        described = source.family.experts
        is_turned = (described is not None and described.transposed) or stored in source.across
        own = weight.t() if is_turned else weight
        replaced[stored, new] = own.to(source.dtype_of(stored)).contiguous()
    return replaced


def stored_rows(
    source: ModelSource, rows: Mapping[int, list[Tensor]]
) -> dict[str | tuple[str, int], Tensor]:
    """Return weights of gate and up as `Writing` replaces them, in the dtypes they are stored in.

    Args:
        rows: {layer: weights of gate and up, or of both in one}.
    """
    replaced: dict[str | tuple[str, int], Tensor] = {}
    for layer, weights in rows.items():
        for name, weight in zip(source.rows_of_mlp(layer), weights, strict=True):
            replaced[name] = weight.to(source.dtype_of(name))
    return replaced
