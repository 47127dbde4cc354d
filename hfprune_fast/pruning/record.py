"""hfprune.json, the record of how a model was pruned: what it says, read, carried and added to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune_fast.checkpoint.atomic import write_whole
from hfprune_fast.checkpoint.folder import read_json_object
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.checkpoint.source_card import CARD
from hfprune_fast.checkpoint.writer import json_text
from hfprune_fast.console import say
from hfprune_fast.errors import CheckpointError
from hfprune_fast.models.sites import SiteKey, experts_path, site_path
from hfprune_fast.pruning.model_card import model_card
from hfprune_fast.report.facts import Facts, read_facts, record_errors

RECORD = "hfprune.json"
_MAX_RECORD_BYTES = 256 << 20
# What is true of the same neurons in another form, or trained.
_CARRIED = (
    *("base_model", "achieved", "requested", "chosen", "provenance"),
    *("keep", "experts", "recovery"),
)


def kept_record(source: ModelSource, keep: Mapping[SiteKey, Tensor]) -> dict[str, Any]:
    """Return what a record says of a keep: neurons by MLP, and experts where there are any.

    MLPs and experts are named by their paths in the dense model.
    """
    family, counts = source.family, source.spec.experts
    neurons: dict[str, list[int]] = {}
    experts: dict[str, list[int]] = {}
    for site in source.spec.sites:
        if site not in keep:
            continue
        layer = site if isinstance(site, int) else site[0]
        path = site_path(family, site, with_experts=bool(counts and counts[layer]))
        neurons[path] = keep[site].tolist()
        if not isinstance(site, int):
            experts.setdefault(experts_path(family, layer), []).append(site[1])
    return {"keep": neurons, **({"experts": experts} if experts else {})}


def read_record(folder: Path) -> dict[str, Any]:
    """Return what hfprune.json of a pruned model says, or raise CheckpointError."""
    if not (folder / RECORD).is_file():
        raise CheckpointError(
            f"{folder} has no {RECORD}; expected the folder of a model that hfprune has pruned"
        )
    return read_json_object(folder / RECORD, _MAX_RECORD_BYTES)


def facts_of(folder: Path) -> Facts | None:
    """Return the facts of a model's record; None where it has no record.

    Raises:
        CheckpointError: the record is damaged: facts or a model card cannot be made from it.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    record = read_record(folder)
    facts = read_facts(record, file)
    with record_errors(file):
        model_card(record, {})
    return facts


def carried_record(source: ModelSource, *others: str) -> dict[str, Any]:
    """Return what stays true of a pruned model's record; say if there is none.

    Args:
        others: of the record, what stays true here beside what always does.
    """
    if not (source.folder / RECORD).is_file():
        say(f"{source.name} has no {RECORD}: what was pruned is not known, and not in the card")
        return {}
    found = read_record(source.folder)
    return {name: found[name] for name in (*_CARRIED, *others) if name in found}


def is_padded(folder: Path) -> bool:
    """Tell whether hfprune wrote this model with zero neurons up to the widest layer."""
    try:
        return bool(read_record(folder)["achieved"]["layout"] == "padded")
    except (CheckpointError, KeyError, TypeError):
        return False


def add_to_record(source: ModelSource, out: Path, more: Mapping[str, Any]) -> None:
    """Add to the record of a pruned checkpoint of `source`, and to its card what that shows."""
    record = {**read_record(out), **more}
    card = model_card(record, source.card)
    for name, text in ((CARD, card), (RECORD, json_text(record, indent=None))):
        write_whole(out / name, text.encode())
