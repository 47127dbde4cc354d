"""Cut a loaded model down to the kept neurons."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hfprune_fast.checkpoint import native
from hfprune_fast.errors import (
    ArgumentError,
    MemoryShortageError,
    is_out_of_memory,
    one_line,
)
from hfprune_fast.models.plain import plain_model
from hfprune_fast.models.registration import record_widths
from hfprune_fast.models.sites import ModelParts, check_keep, parts_of, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prune(
    model: PreTrainedModel,
    keep: Mapping[int, Tensor],
    *,
    down_proj: Mapping[int, Tensor] | None = None,
) -> None:
    """Cut a loaded model's MLPs down to the kept neurons, in place.

    Args:
        model: a causal language model of a known family.
        keep: {layer: sorted int64 indices}, every layer. With different widths, a model of the
            family's own class gets one of `nonuniform`'s, which save_pretrained ships; of another
            class, such as one's own, it must be written by `prune_checkpoint`.
        down_proj: {layer: (D, width)} weights in place of what the cut leaves, such as
            `refit_down_proj` returns.

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
    dense = [mlp.width for mlp in parts.mlps]
    keep = check_keep(keep, dense)
    replaced = _check_down_proj(down_proj, parts, keep)
    cuts = [
        (linear, name, axis, rows_of(keep[layer], mlp.width, times))
        for layer, mlp in enumerate(parts.mlps)
        for linear, axis, times in mlp.linears
        for name, parameter in linear._parameters.items()
        if parameter is not None and (axis == 0 or name == "weight")
    ]
    widths = [len(keep[layer]) for layer in range(len(keep))]
    with torch.inference_mode(False), torch.no_grad():
        _check_memory(cuts)
        with _signals_put_off():
            for linear, name, axis, kept in cuts:
                linear._parameters[name] = _cut_parameter(getattr(linear, name), axis, kept)
            for layer, weight in replaced.items():
                parts.mlps[layer].down.weight.copy_(weight)
            for layer, mlp in enumerate(parts.mlps):
                for linear, axis, times in mlp.linears:
                    if axis:
                        linear.in_features = widths[layer]
                    else:
                        linear.out_features = times * widths[layer]
                for module in parts.layers[layer].modules():  # LlamaMLP and the like store it too
                    if getattr(module, "intermediate_size", None) == dense[layer]:
                        module.intermediate_size = widths[layer]  # type: ignore[assignment]
            record_widths(model, widths)


def _check_down_proj(
    down_proj: Mapping[int, Tensor] | None, parts: ModelParts, keep: Mapping[int, Tensor]
) -> Mapping[int, Tensor]:
    """Return the weights by layer, or raise ArgumentError."""
    given = {} if down_proj is None else down_proj
    if not isinstance(given, Mapping):
        raise ArgumentError(f"down_proj must be {{layer: weight}}, got a {type(given).__name__}")
    for layer, weight in given.items():
        if layer not in keep:
            raise ArgumentError(f"down_proj has layer {layer}; the model has 0..{len(keep) - 1}")
        if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
            raise ArgumentError(
                f"down_proj[{layer}] must be a floating-point tensor, got a {type(weight).__name__}"
                f" {getattr(weight, 'dtype', '')} {getattr(weight, 'device', '')}"
            )
        expected = (parts.mlps[layer].down.weight.shape[0], len(keep[layer]))
        if tuple(weight.shape) != expected:
            raise ArgumentError(f"down_proj[{layer}] must be {expected}, got {tuple(weight.shape)}")
    return given


def _check_memory(cuts: Sequence[tuple[nn.Linear, str, int, Tensor]]) -> None:
    """Raise MemoryShortageError unless there is room for all that the cuts hold at once."""
    extra_bytes, largest_bytes = Counter[torch.device](), Counter[torch.device]()
    for linear, name, axis, kept in cuts:
        parameter = getattr(linear, name)
        device, kept_bytes = parameter.device, parameter.nbytes // parameter.shape[axis] * len(kept)
        if parameter.untyped_storage().nbytes() > parameter.nbytes:  # mapped, or a part of another
            extra_bytes[device] += kept_bytes  # so nothing is freed when it is replaced
        largest_bytes[device] = max(largest_bytes[device], kept_bytes)
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


def _cut_parameter(parameter: Tensor, axis: int, kept: Tensor) -> nn.Parameter:
    whole = parameter.detach()
    kept = kept.to(whole.device)
    matrix = whole if whole.dim() == 2 else whole[:, None]
    shape = (len(kept), matrix.shape[1]) if axis == 0 else (matrix.shape[0], len(kept))
    cut = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    compact = native.compact_rows if axis == 0 else native.compact_columns
    compact(matrix, kept, out=cut)
    cut = cut if whole.dim() == 2 else cut[:, 0]
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)
