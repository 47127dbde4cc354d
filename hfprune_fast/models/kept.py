"""What a model with experts keeps, as config.json can say it: one number for all layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.families import Family
from hfprune_fast.models.sites import SiteKey
from hfprune_fast.models.spec import ModelSpec

# What versions of transformers call the number of experts; some write another than they read.
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class KeptExperts:
    """The sizes of a model with experts after pruning."""

    count: int  # of each layer that has any
    width: int  # of each expert
    shared_width: int  # of the MLP beside them; 0 where there is none
    dense_width: int  # of the MLPs of layers without experts; 0 where all layers have experts


def kept_experts(
    keep: Mapping[SiteKey, Tensor], spec: ModelSpec, family: Family
) -> KeptExperts | None:
    """Return the sizes that a keep leaves of a model with experts; None if it has none.

    Args:
        keep: as `check_keep` returns it.

    Raises:
        ArgumentError: its layers or experts differ in what config.json says once for all of them,
            or the router could not choose as many as it does.
    """
    if not spec.experts or family.experts is None:
        return None
    with_experts = [layer for layer, count in enumerate(spec.experts) if count]
    kept: dict[int, list[int]] = {layer: [] for layer in with_experts}
    for site in keep:
        if not isinstance(site, int):
            kept[site[0]].append(site[1])
    count = _one(
        {f"layer {layer}": len(experts) for layer, experts in kept.items()},
        "leave each layer the same number of experts",
    )
    if count < spec.experts_per_token:
        raise ArgumentError(
            f"keep must leave each layer at least the {spec.experts_per_token} experts that a "
            f"token chooses, got {count}"
        )
    for layer, experts in kept.items():
        _check_groups(layer, experts, count, spec)
    of_experts = {f"{site}": len(n) for site, n in keep.items() if not isinstance(site, int)}
    width = _one(of_experts, "leave each expert the same number of neurons")
    own = {layer: len(keep[layer]) for layer in range(spec.num_layers) if layer in keep}
    shared = {f"layer {layer}": own[layer] for layer in with_experts if layer in own}
    dense = {f"layer {layer}": n for layer, n in own.items() if layer not in kept}
    each = "leave the shared expert of each layer the same number of neurons"
    shared_width = _one(shared, each) if shared else 0
    if not family.experts.shared_width and shared_width % width:
        raise ArgumentError(
            f"keep must leave shared experts a multiple of the {width} neurons of an expert, which "
            f"is all that config.json can say, got {shared_width}"
        )
    each = "leave each layer without experts the same number of neurons"
    return KeptExperts(count, width, shared_width, _one(dense, each) if dense else 0)


def _one(sizes: Mapping[str, int], expected: str) -> int:
    """Return the size that all have, or raise ArgumentError with two that differ."""
    (where, first), *others = sizes.items()
    for other, size in others:
        if size != first:
            raise ArgumentError(
                f"keep must {expected}, as config.json has one number for all of them; got "
                f"{first} in {where} and {size} in {other}"
            )
    return first


def _check_groups(layer: int, experts: Collection[int], count: int, spec: ModelSpec) -> None:
    """Refuse experts that do not form the groups that the router chooses from first."""
    groups = spec.expert_groups
    if groups == 1:
        return
    of_each = Counter(expert // (spec.num_experts // groups) for expert in experts)
    least = spec.least_experts // groups
    if len(of_each) < groups or len(set(of_each.values())) > 1 or count // groups < least:
        got = [of_each[group] for group in range(groups)]
        raise ArgumentError(
            f"keep must leave each of the {groups} groups of experts of a layer the same number, "
            f"{least} or more, got {got!s:.100} in layer {layer}"
        )


def size_keys(family: Family, kept: KeptExperts, said: Collection[str]) -> dict[str, int]:
    """Return the keys of a text's configuration that say these sizes.

    Args:
        said: the keys that the configuration has.
    """
    experts = family.experts
    if experts is None:
        return {}
    counts = [key for key in COUNT_KEYS if key in said] or [experts.count]
    keys = {**dict.fromkeys(counts, kept.count), experts.width: kept.width}
    if kept.dense_width:
        keys[family.width] = kept.dense_width
    if kept.shared_width and experts.shared_width:
        keys[experts.shared_width] = kept.shared_width
    elif kept.shared_width:
        keys["n_shared_experts"] = kept.shared_width // kept.width
    return keys
