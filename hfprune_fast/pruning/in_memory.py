"""Cut a loaded model down to the kept neurons."""

from __future__ import annotations

import math
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.written import Part, part_of, parts_of_all
from hfprune_fast.errors import (
    ArgumentError,
    MemoryShortageError,
    is_out_of_memory,
    one_line,
    shown,
)
from hfprune_fast.models.kept import KeptExperts, kept_experts
from hfprune_fast.models.plain import plain_model
from hfprune_fast.models.registration import record_widths
from hfprune_fast.models.sites import ModelParts, SiteKey, check_keep, parts_of
from hfprune_fast.models.spec import spec_of
from hfprune_fast.models.tensors import Place, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Cut:
    """A parameter or buffer that is replaced by what stays of it."""

    module: nn.Module
    name: str
    parts: tuple[Part, ...]  # one, or one for each entry of the first axis where `by_entry`
    shape: tuple[int, ...]
    by_entry: bool = False

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    @property
    def kept_bytes(self) -> int:
        return math.prod(self.shape) * self.tensor.element_size()

    def make(self) -> None:
        """Replace the tensor."""
        whole = self.tensor.detach()
        cut = torch.empty(self.shape, dtype=whole.dtype, device=whole.device)
        for entry, part in enumerate(self.parts):
            from_, to = whole if part.entry is None else whole[part.entry], cut
            _copy_kept(from_, part, to[entry] if self.by_entry else to)
        if self.name in self.module._buffers:
            self.module._buffers[self.name] = cut
        else:
            needs_grad = self.tensor.requires_grad
            self.module._parameters[self.name] = nn.Parameter(cut, requires_grad=needs_grad)


def prune(
    model: PreTrainedModel,
    keep: Mapping[Any, Tensor],
    *,
    down_proj: Mapping[Any, Tensor] | None = None,
) -> None:
    """Cut a loaded model's MLPs and experts down to the kept neurons, in place.

    Args:
        model: a causal language model of a known family.
        keep: {layer: sorted int64 indices}, every layer that has an MLP of its own; with experts
            also {(layer, expert): ...} of those that stay, as `prune_checkpoint` takes it. With
            different widths, a model of the family's own class gets one of `nonuniform`'s, which
            save_pretrained ships; of another class, such as one's own, it must be written by
            `prune_checkpoint`.
        down_proj: {layer: (D, width)} weights in place of what the cut leaves, such as
            `refit_down_proj` returns; of an expert {(layer, expert): (D, width)}.

    Raises:
        ArgumentError: keep or down_proj does not fit the model, an MLP or the head is not plain
            (`models.plain.plain_model`), or adapters are attached; nothing was cut.
        MemoryShortageError: not enough memory; nothing was cut.

    Whole or not at all: what can fail comes before the first parameter is replaced, and Ctrl-C or
    SIGTERM after the last one.

    Memory: each parameter gets storage of exactly its kept size, and the old one goes before the
    next is cut, so that at most one parameter's kept bytes are held twice.
    """
    model = plain_model(model, "prune")
    parts = parts_of(model)
    keep = check_keep(keep, parts.widths)
    experts = kept_experts(keep, spec_of(model), parts.family)
    replaced = _check_down_proj(down_proj, parts, keep)
    cuts = [*_cuts_of_mlps(parts, keep), *_cuts_of_experts(parts, keep)]
    had, widths = parts.widths, [len(keep.get(layer, ())) for layer in range(len(parts.layers))]
    with torch.inference_mode(False), torch.no_grad():
        _check_memory(cuts)
        with _signals_put_off():
            for cut in cuts:
                cut.make()
            for site, weight in replaced.items():
                _down_proj(parts, keep, site).copy_(weight)
            for layer, mlp in parts.own_mlps.items():
                for linear, axis, times in mlp.linears:
                    if axis:
                        linear.in_features = widths[layer]
                    else:
                        linear.out_features = times * widths[layer]
                others = parts.experts[layer]
                for module in parts.layers[layer].modules():  # LlamaMLP and the like store it too
                    is_its = others is None or module is not others.module
                    if is_its and getattr(module, "intermediate_size", None) == had[layer]:
                        module.intermediate_size = widths[layer]  # type: ignore[assignment]
            if experts is not None:
                _record_experts(model, parts, had, experts)
            record_widths(model, widths, experts)


def _cuts_of_mlps(parts: ModelParts, keep: Mapping[SiteKey, Tensor]) -> Iterator[_Cut]:
    for layer, mlp in parts.own_mlps.items():
        for linear, axis, times in mlp.linears:
            for name, parameter in linear._parameters.items():
                if parameter is not None and (axis == 0 or name == "weight"):
                    place = Place(layer, axis, times)
                    part, shape = part_of(place, tuple(parameter.shape), keep[layer])
                    yield _Cut(linear, name, (part,), shape)


def _cuts_of_experts(parts: ModelParts, keep: Mapping[SiteKey, Tensor]) -> Iterator[_Cut]:
    for layer, experts in parts.with_experts.items():
        kept = [expert for expert in range(experts.count) if (layer, expert) in keep]
        below = f"{parts.family.layers}.{layer}.{experts.described.path}"
        for name, parameter in experts.module._parameters.items():
            place = place_of(parts.family, f"{below}.{name}")
            if place is not None:
                of_all = parts_of_all(place, tuple(parameter.shape), kept, keep)
                yield _Cut(experts.module, name, *of_all, by_entry=place.axis is not None)
        for module, name, tensor in experts.per_expert():
            of_all = parts_of_all(Place(layer, of_all=True), tuple(tensor.shape), kept, keep)
            yield _Cut(module, name, *of_all)


def _record_experts(
    model: PreTrainedModel, parts: ModelParts, had: Mapping[SiteKey, int], kept: KeptExperts
) -> None:
    """Set what modules say of the number of experts and of their width, which some compute with."""
    counts = set(Counter(site[0] for site in had if not isinstance(site, int)).values())
    modules = [model, *(m for layer in parts.with_experts for m in parts.layers[layer].modules())]
    for module in modules:
        for name in ("num_experts", "n_routed_experts"):
            if getattr(module, name, None) in counts:
                setattr(module, name, kept.count)
    for layer, experts in parts.with_experts.items():
        for name in ("intermediate_dim", "intermediate_size", "expert_dim"):
            if getattr(experts.module, name, None) == had[layer, 0]:
                setattr(experts.module, name, kept.width)
        for module, _, _ in experts.per_expert():
            if isinstance(module, nn.Linear):
                module.out_features = kept.count


def _down_proj(parts: ModelParts, keep: Mapping[SiteKey, Tensor], site: SiteKey) -> Tensor:
    """Return the (D, width) down projection of an MLP or expert of the cut model."""
    if isinstance(site, int):
        return parts.own_mlps[site].down.weight
    layer, expert = site
    number = sum(1 for e in range(expert) if (layer, e) in keep)
    return parts.with_experts[layer].down(number)


def _check_down_proj(
    down_proj: Mapping[SiteKey, Tensor] | None, parts: ModelParts, keep: Mapping[SiteKey, Tensor]
) -> Mapping[SiteKey, Tensor]:
    """Return the weights by layer or expert, or raise ArgumentError."""
    given = {} if down_proj is None else down_proj
    if not isinstance(given, Mapping):
        raise ArgumentError(f"down_proj must be {{layer: weight}}, got a {type(given).__name__}")
    hidden = parts.head.weight.shape[1]
    for site, weight in given.items():
        if site not in keep:
            has = "keep has no such MLP or expert"
            if not parts.with_experts:
                has = f"the model has 0..{len(keep) - 1}"
            raise ArgumentError(f"down_proj has layer {shown(site)}; {has}")
        if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
            raise ArgumentError(
                f"down_proj[{site}] must be a floating-point tensor, got a {type(weight).__name__}"
                f" {getattr(weight, 'dtype', '')} {getattr(weight, 'device', '')}"
            )
        expected = (hidden, len(keep[site]))
        if tuple(weight.shape) != expected:
            raise ArgumentError(f"down_proj[{site}] must be {expected}, got {tuple(weight.shape)}")
    return given


def _check_memory(cuts: Sequence[_Cut]) -> None:
    """Raise MemoryShortageError unless there is room for all that the cuts hold at once."""
    extra_bytes, largest_bytes = Counter[torch.device](), Counter[torch.device]()
    for cut in cuts:
        tensor, device = cut.tensor, cut.tensor.device
        if tensor.untyped_storage().nbytes() > tensor.nbytes:  # mapped, or a part of another
            extra_bytes[device] += cut.kept_bytes  # so nothing is freed when it is replaced
        largest_bytes[device] = max(largest_bytes[device], cut.kept_bytes)
    try:
        for device, largest in largest_bytes.items():
            torch.empty(extra_bytes[device] + largest, dtype=torch.uint8, device=device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortageError(
            "not enough memory to cut the model, which is unchanged; free some, or use "
            f"prune_checkpoint, which needs almost none ({one_line(error)})"
        ) from None


@contextmanager
def _signals_put_off() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect when the block is through; only a main thread gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in handlers.items():
            if handler is not None:  # else it is not Python's
                signal.signal(number, lambda got, _: came.append(got))
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
    for got in came:
        signal.raise_signal(got)


def _copy_kept(from_: Tensor, part: Part, to: Tensor) -> None:
    """Copy what stays of a vector or matrix."""
    rows = part.rows()
    if rows is None:
        to.copy_(from_)
        return
    matrix, out = (from_, to) if from_.dim() == 2 else (from_[:, None], to[:, None])
    compact = native.compact_rows if part.axis == 0 else native.compact_columns
    compact(matrix, rows.to(from_.device), out=out)
