"""The parts of a loaded model that scoring and pruning touch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.errors import ArgumentError, UnsupportedModelError, one_line
from hfprune_fast.models.declared import family_of, family_type
from hfprune_fast.models.experts import ExpertsMLP, experts_of
from hfprune_fast.models.families import Family, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What names a gated MLP of a model: the layer whose own it is, or (layer, expert).
SiteKey = int | tuple[int, int]


@dataclass(frozen=True)
class GatedMLP:
    """The linear layers of one gated MLP, down(act_fn(gate(x)) * up(x)), and their module.

    Where `gate` and `up` are one layer, its rows are gate's and then up's.
    """

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def fused(self) -> bool:
        return self.gate is self.up

    @property
    def width(self) -> int:
        """The number of neurons."""
        return self.down.weight.shape[1]

    @property
    def gate_and_up_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of gate and up, (F, D) each, without copying them."""
        if self.fused:
            gate, up = self.gate.weight.detach().chunk(2)
            return gate, up
        return self.gate.weight, self.up.weight

    @property
    def linears(self) -> list[tuple[nn.Linear, int, int]]:
        """Each layer with the axis of its neurons, and how often each neuron is in it."""
        rows = [(self.gate, 0, 2)] if self.fused else [(self.gate, 0, 1), (self.up, 0, 1)]
        return [*rows, (self.down, 1, 1)]


@dataclass(frozen=True)
class Logits:
    """What a model makes of its head's output z: softcap · tanh(scale · z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the kernels."""
        return {"logit_scale": self.scale, "softcap": self.softcap}

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True)
class ModelParts:
    """The parts of one model, found by the names in `families`.

    A layer has an MLP of its own, or experts, or both: then the MLP is the shared expert.
    """

    family: Family
    decoder: nn.Module
    embedding: nn.Module
    layers: tuple[nn.Module, ...]
    mlps: tuple[GatedMLP | None, ...]
    experts: tuple[ExpertsMLP | None, ...]
    norm: nn.Module
    head: nn.Linear
    logits: Logits

    @property
    def own_mlps(self) -> dict[int, GatedMLP]:
        """The MLPs that all tokens go through, by layer."""
        return {layer: mlp for layer, mlp in enumerate(self.mlps) if mlp is not None}

    @property
    def with_experts(self) -> dict[int, ExpertsMLP]:
        """The experts, by layer."""
        return {layer: of for layer, of in enumerate(self.experts) if of is not None}

    @property
    def widths(self) -> dict[SiteKey, int]:
        """The neurons of each MLP, by layer; of each expert, by (layer, expert)."""
        widths: dict[SiteKey, int] = {}
        for layer, (mlp, experts) in enumerate(zip(self.mlps, self.experts, strict=True)):
            if mlp is not None:
                widths[layer] = mlp.width
            if experts is not None:
                widths |= {(layer, expert): experts.width for expert in range(experts.count)}
        return widths

    def output_scale(self, layer: int) -> float:
        """What an MLP's output is multiplied by when it is added to the residual stream."""
        path = self.family.output_scale
        return float(attrgetter(path)(self.layers[layer])) if path else 1.0

    def added(self, layer: int, output: Tensor) -> Tensor:
        """Return what is added to the residual stream, of what the MLP's down_proj returns."""
        if self.family.norm_behind:
            output = self.layers[layer].get_submodule(self.family.norm_behind)(output)
        return output * self.output_scale(layer)


def parts_of(model: PreTrainedModel) -> ModelParts:
    """Find the decoder, the gated MLPs and the head of a loaded causal language model."""
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise UnsupportedModelError(
            f"expected a causal language model of transformers, got {type(model).__name__}"
        )
    config: Any = model.config
    family = family_of({**config.to_dict(), "architectures": [type(model).__name__]})
    text = config if family.tower is None else config.text_config
    try:
        decoder = model.get_submodule(family.decoder)
        layers: Any = decoder.get_submodule(family.layers)
        experts = tuple(experts_of(layer, family.experts) for layer in layers)
        return ModelParts(
            family,
            decoder,
            embedding=decoder.get_submodule(family.embedding),
            layers=tuple(layers),
            mlps=tuple(_mlp_of(*each, family) for each in zip(layers, experts, strict=True)),
            experts=experts,
            norm=decoder.get_submodule(family.norm),
            head=model.get_submodule(family.head),  # type: ignore[arg-type]
            logits=_logits(family, text),
        )
    except (AttributeError, TypeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has not the parts of a {family_type(config.to_dict())} with a "
            f"head, such as {family.head} ({one_line(error)}); load it with AutoModelForCausalLM, "
            "or give the whole model that it is the text of"
        ) from None


def _mlp_of(layer: nn.Module, experts: ExpertsMLP | None, family: Family) -> GatedMLP | None:
    """Return the MLP of a layer that all tokens go through; None where there are experts alone."""
    site: Site | None = family.site if experts is None else experts.described.shared
    if site is None:
        return None
    mlp, _, _ = site.down.rpartition(".")
    return GatedMLP(*map(layer.get_submodule, (mlp, site.gate, site.up, site.down)))  # type: ignore[arg-type]


def _logits(family: Family, config: Any) -> Logits:
    by_key: dict[str, float] = {}
    for key in (family.logit_scale, family.logit_divisor, family.softcap):
        value = getattr(config, key, None) if key else None
        if value is None:
            continue
        by_key[key] = float(value)
        if not 2.0**-100 <= by_key[key] <= 2.0**100:
            raise UnsupportedModelError(f"{key} is {value!r:.40}, expected a positive number")
    scale = by_key.get(family.logit_scale, 1.0) / by_key.get(family.logit_divisor, 1.0)
    return Logits(scale, by_key.get(family.softcap))


def site_slices(widths: Mapping[SiteKey, int]) -> dict[SiteKey, slice]:
    """Return where the neurons of each MLP and expert are along the axis of a table.

    They follow one another; without experts each has as much room as the widest, so that the table
    is one of layers and neurons.
    """
    experts = any(isinstance(site, tuple) for site in widths)
    widest, begin, slices = max(widths.values()), 0, {}
    for site, width in widths.items():
        slices[site] = slice(begin, begin + width)
        begin += width if experts else widest
    return slices


def table_shape(widths: Mapping[SiteKey, int]) -> tuple[int, ...]:
    """Return the shape of such a table: (L, F), or (N,) with experts."""
    if any(isinstance(site, tuple) for site in widths):
        return (sum(widths.values()),)
    return len(widths), max(widths.values())


def rows_of(kept: Tensor, width: int, times: int, paired: bool = False) -> Tensor:
    """Return where kept neurons are in an axis of `times` blocks of `width` neurons each.

    Where `paired`, each neuron is there twice, side by side.
    """
    if paired:
        return (2 * kept[:, None] + torch.arange(2, device=kept.device)).flatten()
    if times == 1:
        return kept
    return torch.cat([kept + width * i for i in range(times)])


def check_keep(keep: Mapping[Any, Tensor], dense: Mapping[SiteKey, int]) -> dict[Any, Tensor]:
    """Return keep as int64 tensors, or raise ArgumentError.

    Args:
        keep: an entry for each layer's own MLP, and one for each expert that stays.
        dense: the neurons of each MLP and expert.
    """
    needed = {site for site in dense if isinstance(site, int)}
    if not isinstance(keep, Mapping) or not needed <= set(keep) <= set(dense):
        got = list(keep) if isinstance(keep, Mapping) else f"a {type(keep).__name__}"
        raise ArgumentError(
            f"keep must have an entry for each layer {_range(needed)}"
            f"{' and (layer, expert) that stays' if len(dense) > len(needed) else ''}, got "
            f"{got!s:.300}"
        )
    try:
        tensors = {site: torch.as_tensor(keep[site]).cpu() for site in dense if site in keep}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"keep must hold tensors of int64 indices ({one_line(error)})"
        ) from None
    for site, indices in tensors.items():
        ok = (
            indices.dim() == 1
            and len(indices) > 0
            and indices.dtype == torch.int64
            and bool((indices.diff() > 0).all())
            and int(indices[0]) >= 0
            and int(indices[-1]) < dense[site]
        )
        if not ok:
            raise ArgumentError(
                f"keep[{site}] must be sorted, distinct int64 indices in 0..{dense[site] - 1}, "
                "one or more"
            )
    return tensors


def site_path(family: Family, site: SiteKey, *, with_experts: bool) -> str:
    """Return the path in the model of an MLP or of an expert, by which records name it.

    Args:
        with_experts: the site's layer has experts.
    """
    if not isinstance(site, int):
        layer, expert = site
        return f"{experts_path(family, layer)}.{expert}"
    shared = family.experts.shared if family.experts is not None and with_experts else None
    path, _, _ = (shared or family.site).down.rpartition(".")
    return f"{family.decoder}.{family.layers}.{site}.{path}"


def experts_path(family: Family, layer: int) -> str:
    """Return the path in the model of the experts of a layer."""
    path = family.experts.path if family.experts is not None else ""
    return f"{family.decoder}.{family.layers}.{layer}.{path}"


def site_of_path(path: str) -> SiteKey:
    """Return the layer, or (layer, expert), that `site_path` names.

    Raises:
        ValueError: there are no such numbers in it.
    """
    numbers = [int(part) for part in path.split(".") if re.fullmatch("[0-9]{1,5}", part)]
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2 and path.endswith(f".{numbers[1]}"):
        return numbers[0], numbers[1]
    raise ValueError(f"{path!r:.100} names no layer or expert")


def _range(layers: set[Any]) -> str:
    return f"0..{max(layers)}" if layers == set(range(len(layers))) else f"in {sorted(layers)}"
