"""What a config.json declares of experts: completed, and checked before any are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune_fast.errors import CheckpointError, UnsupportedModelError
from hfprune_fast.models.families import NON_UNIFORM, Experts, Family
from hfprune_fast.models.kept import COUNT_KEYS

_MAX_EXPERTS, _MAX_WIDTH = 4096, 1 << 24
# Beside those that `Experts` names.
_OTHERS = {
    "n_shared_experts": (1, 1024),
    "first_k_dense_replace": (0, 1000),
    "decoder_sparse_step": (1, 1000),
}


def with_experts(
    path: Path, text: Mapping[str, Any], family: Family, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a configuration with all that it, or its class, says of experts, checked.

    Args:
        path: of config.json.
        family: its own; the configuration is returned as it is where there are no experts.
        defaults: what its class has where the configuration says nothing.
    """
    experts, said = family.experts, dict(text)
    if experts is None:
        return said
    by_layer = said.get("per_layer_config") and not family.own_layers
    if by_layer or str(text.get("model_type")).startswith(NON_UNIFORM):
        raise UnsupportedModelError(
            f"{path} declares layers of different sizes (model_type or per_layer_config), "
            "which is not supported for models with experts"
        )
    counts = {key: said[key] for key in COUNT_KEYS if said.get(key) is not None}
    if len(set(map(repr, counts.values()))) > 1:
        raise CheckpointError(
            f"{path} has {' and '.join(f'{k} {v!r:.20}' for k, v in counts.items())}, expected the "
            "same number of experts in both; correct it there"
        )
    if counts:
        said[experts.count] = next(iter(counts.values()))
    if experts.chosen in text and text[experts.chosen] is None:  # transformers refuses it too
        raise CheckpointError(f"{path} has {experts.chosen} null, expected a number of experts")
    needed = (experts.count, experts.width, experts.chosen, family.width)
    shared = (experts.shared_width, "n_shared_experts" if _is_multiple(experts) else "")
    for key in (*needed, *shared, experts.groups, "topk_group", *_OTHERS, "mlp_only_layers"):
        if key and said.get(key) is None and defaults.get(key) is not None:
            said[key] = defaults[key]
    for key in (experts.count, experts.width, experts.chosen, *shared):
        if key and said.get(key) is None:
            raise CheckpointError(f"{path} has no {key}")
    _check(path, said, experts)
    return said


def _is_multiple(experts: Experts) -> bool:
    """Return whether the shared expert's width is a multiple of the experts'."""
    return experts.shared is not None and not experts.shared_width


def _check(path: Path, said: Mapping[str, Any], experts: Experts) -> None:
    sizes = {experts.count: (1, _MAX_EXPERTS), experts.width: (1, _MAX_WIDTH), **_OTHERS}
    sizes[experts.chosen] = (1, _MAX_EXPERTS)
    if experts.shared_width:
        sizes[experts.shared_width] = (1, _MAX_WIDTH)
    if experts.groups:
        sizes |= {experts.groups: (1, _MAX_EXPERTS), "topk_group": (1, _MAX_EXPERTS)}
    for key, (least, largest) in sizes.items():
        value = said.get(key)
        if value is not None and (type(value) is not int or not least <= value <= largest):
            raise CheckpointError(
                f"{path} has {key} {value!r:.60}, expected an integer in {least}..{largest}"
            )
    dense = said.get("mlp_only_layers")
    if dense is not None and not (
        isinstance(dense, list) and len(dense) <= 1000 and all(type(i) is int for i in dense)
    ):
        raise CheckpointError(
            f"{path} has mlp_only_layers {dense!r:.60}, expected a list of layers' numbers"
        )
    count, chosen = said[experts.count], said[experts.chosen]
    if chosen > count:
        raise CheckpointError(
            f"{path} has {experts.chosen} {chosen}, expected {experts.count} {count} at most"
        )
    groups = (said.get(experts.groups) or 1) if experts.groups else 1
    if count % groups:
        raise CheckpointError(
            f"{path} has {experts.groups} {groups}, which does not divide {experts.count} {count}"
        )
    of_groups = said.get("topk_group") or 1
    if experts.groups and of_groups > groups:
        raise CheckpointError(
            f"{path} has topk_group {of_groups}, expected {experts.groups} {groups} at most"
        )
