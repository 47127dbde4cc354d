"""What hfprune.json says, checked: it is read from a folder that anyone may have written."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_fast.errors import CheckpointError, one_line_errors, shown
from hfprune_fast.evaluation.changes import PositionBin
from hfprune_fast.evaluation.fidelity import Fidelity
from hfprune_fast.models.sites import SiteKey, site_of_path

# Those that allocation "auto" tries, in words.
ALLOCATION_TEXTS = {
    "uniform": "gives all the same",
    "measured": "ranks all neurons together, each layer’s scores scaled by the KL of cutting it",
}
_MAX_LAYERS, _MAX_BINS, _MAX_KL_NATS = 10_000, 1000, 1e6


@dataclass(frozen=True)
class Measurement:
    """Fidelity on a held-out text."""

    text: str
    fidelity: Fidelity
    by_position: tuple[PositionBin, ...]

    def record(self) -> dict[str, Any]:
        """Return what hfprune.json says of it; `_measurement` reads it."""
        bins = [[b.first, b.last, b.kl_nats, b.tokens] for b in self.by_position]
        return {"text": self.text, **vars(self.fidelity), "kl_nats_by_position": bins}


@dataclass(frozen=True)
class ExpertFacts:
    """What became of the experts of every layer that has any."""

    count: int
    dense_count: int
    width: int  # neurons kept of each
    dense_width: int
    active_params: int  # that a token goes through
    dense_active_params: int


@dataclass(frozen=True)
class Facts:
    """A pruning, as its record has it."""

    base_model: str
    layout: str
    # Neurons kept in each layer's own MLP; 0 where there are experts alone.
    widths: tuple[int, ...]
    dense_widths: tuple[int, ...]
    params: int
    dense_params: int
    prune_ratio: float
    param_ratio: float
    allocation: str  # what was chosen; "" if that is not recorded
    allocations_kl_nats: dict[str, float]  # by name; empty if none was measured
    measurement: Measurement | None
    experts: ExpertFacts | None = None

    @property
    def suited(self) -> list[int]:
        """The widths that quantisers see."""
        own = [width for width in self.widths if width]
        return own if self.experts is None else [*own, self.experts.width]


def record_errors(file: Path) -> AbstractContextManager[None]:
    """Return a context in which what a record's contents raise is one line that names its file."""
    return one_line_errors(f"{file} is damaged, or not written by hfprune")


def read_facts(record: Mapping[str, Any], file: Path) -> Facts:
    """Return what a record says, read from `file`, or raise CheckpointError if it is damaged."""
    if "recovery" in record and "achieved" not in record:
        raise CheckpointError(
            f"{file} is of adapters, or of a model that was not pruned by hfprune; expected the "
            "folder of a pruned model, with its own"
        )
    with record_errors(file):
        return _facts(record)


def _facts(record: Mapping[str, Any]) -> Facts:
    achieved, chosen = record["achieved"], record.get("chosen") or {}
    kept = {site: len(neurons) for site, neurons in recorded_keep(record).items()}
    layers = 1 + max(site if isinstance(site, int) else site[0] for site in kept)
    if not 1 <= layers <= _MAX_LAYERS:
        raise ValueError(f"{layers} layers")
    experts = _experts(achieved, kept)
    widths = tuple(kept.get(layer, 0) for layer in range(layers))
    widest = achieved["intermediate_size"]
    if list(widths) != achieved.get("mlp_widths", [widest] * layers) or max(widths) != widest:
        raise ValueError("keep and its widths say different numbers of neurons")
    dense = achieved.get("dense_mlp_widths")
    if dense is None:
        dense = [achieved["dense_intermediate_size"]] * len(widths)
    dense_widths = tuple(_count(width) for width in dense)
    pairs = zip(widths, dense_widths, strict=True)  # a ValueError if they are not as many
    # A layer of experts alone has no neurons of its own, before and after.
    none = experts is not None
    if not all(1 <= has <= had or (none and has == had == 0) for has, had in pairs):
        raise ValueError("its widths are not those of the layers that it lists")
    if _count(achieved["dense_params"]) == 0:
        raise ValueError("the dense model has no parameters")
    kl_nats = dict(chosen.get("allocations_kl_nats") or {})
    tried = {name: _number(kl, _MAX_KL_NATS) for name, kl in kl_nats.items()}
    if not tried.keys() <= ALLOCATION_TEXTS.keys():
        raise ValueError("unknown allocation")
    fidelity = record.get("fidelity")
    return Facts(
        base_model=_text(record["base_model"]),
        layout=str(achieved.get("layout", "uniform")),
        widths=widths,
        dense_widths=dense_widths,
        params=_count(achieved["params"]),
        dense_params=_count(achieved["dense_params"]),
        prune_ratio=_number(achieved["prune_ratio"]),
        param_ratio=_number(achieved["param_ratio"]),
        allocation=str(chosen.get("allocation", "")),
        allocations_kl_nats=tried,
        measurement=None if fidelity is None else _measurement(fidelity),
        experts=experts,
    )


def recorded_keep(record: Mapping[str, Any]) -> dict[SiteKey, list[int]]:
    """Return the neurons that a record lists, by layer or (layer, expert).

    Raises:
        ValueError, AttributeError, TypeError: it is damaged.
    """
    keep = {site_of_path(path): neurons for path, neurons in record["keep"].items()}
    if not keep or len(keep) < len(record["keep"]):
        raise ValueError("keep lists no MLP, or one twice")
    if not all(type(neuron) is int for neurons in keep.values() for neuron in neurons):
        raise ValueError("keep lists what is no neuron")
    return keep


def _experts(achieved: Mapping[str, Any], kept: Mapping[SiteKey, int]) -> ExpertFacts | None:
    """Return what became of experts; `kept` is how many neurons stay, by site."""
    of_experts = {site: n for site, n in kept.items() if not isinstance(site, int)}
    if not of_experts and "experts" not in achieved:
        return None
    facts = ExpertFacts(
        *(_count(achieved[name]) for name in ("experts", "dense_experts")),
        *(_count(achieved[name]) for name in ("expert_width", "dense_expert_width")),
        *(_count(achieved[name]) for name in ("active_params", "dense_active_params")),
    )
    by_layer = Counter(layer for layer, _ in of_experts)
    same = set(by_layer.values()) == {facts.count} and set(of_experts.values()) == {facts.width}
    if not same or facts.count > facts.dense_count or not 1 <= facts.width <= facts.dense_width:
        raise ValueError("keep and its experts say different numbers")
    return facts


def _measurement(fidelity: Mapping[str, Any]) -> Measurement:
    listed = list(fidelity.get("kl_nats_by_position", []))[:_MAX_BINS]
    bins = tuple(
        PositionBin(_count(a), _count(b), _number(kl, _MAX_KL_NATS), _count(n))
        for a, b, kl, n in listed
    )
    ends = [-1, *(each.last for each in bins)]
    if any(e.first != end + 1 or e.last <= end for e, end in zip(bins, ends, strict=False)):
        raise ValueError("its positions do not follow one another")
    return Measurement(
        str(fidelity["text"]),
        Fidelity(
            kl_nats=_number(fidelity["kl_nats"], _MAX_KL_NATS),
            ppl_dense=_number(fidelity["ppl_dense"]),
            ppl_pruned=_number(fidelity["ppl_pruned"]),
            top1_agreement=_number(fidelity["top1_agreement"]),
            tokens=_count(fidelity["tokens"]),
            top5_agreement=_number(fidelity["top5_agreement"]),
        ),
        bins,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a name is {shown(value)}")
    return value


def _number(value: Any, most: float = sys.float_info.max) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= most:
        raise ValueError(f"a number is {shown(value)}")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0 or value >= 1 << 63:
        raise ValueError(f"a count is {shown(value)}")
    return value
