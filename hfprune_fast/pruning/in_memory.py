"""Cut a loaded model down to the kept neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hfprune_fast.checkpoint import native
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.registration import record_widths
from hfprune_fast.models.sites import check_keep, parts_of

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
        ArgumentError: keep or down_proj does not fit the model; nothing was cut.

    Memory: each parameter gets storage of exactly its kept size, and the old one goes before the
    next is cut, so that at most one parameter's kept bytes are held twice.
    """
    parts = parts_of(model)
    dense = [mlp.gate.out_features for mlp in parts.mlps]
    keep = check_keep(keep, dense)
    for layer, weight in (down_proj or {}).items():
        if layer not in keep:
            raise ArgumentError(f"down_proj has layer {layer}; the model has 0..{len(dense) - 1}")
        expected = (parts.mlps[layer].down.weight.shape[0], len(keep[layer]))
        if tuple(weight.shape) != expected:
            raise ArgumentError(f"down_proj[{layer}] must be {expected}, got {tuple(weight.shape)}")
    for layer, mlp in enumerate(parts.mlps):
        kept, width = keep[layer].to(mlp.gate.weight.device), len(keep[layer])
        for linear in (mlp.gate, mlp.up):
            linear.weight = _cut_parameter(linear.weight, 0, kept)
            if linear.bias is not None:
                linear.bias = _cut_parameter(linear.bias, 0, kept)
            linear.out_features = width
        mlp.down.weight = _cut_parameter(mlp.down.weight, 1, kept)
        if down_proj and layer in down_proj:
            mlp.down.weight.data.copy_(down_proj[layer])
        mlp.down.in_features = width
        for module in parts.layers[layer].modules():  # LlamaMLP and the like store it too
            if getattr(module, "intermediate_size", None) == dense[layer]:
                module.intermediate_size = width  # type: ignore[assignment]
    record_widths(model, [len(keep[layer]) for layer in range(len(keep))])


def _cut_parameter(parameter: Tensor, axis: int, kept: Tensor) -> nn.Parameter:
    whole = parameter.detach()
    matrix = whole if whole.dim() == 2 else whole[:, None]
    shape = (len(kept), matrix.shape[1]) if axis == 0 else (matrix.shape[0], len(kept))
    cut = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    compact = native.compact_rows if axis == 0 else native.compact_columns
    compact(matrix, kept, out=cut)
    cut = cut if whole.dim() == 2 else cut[:, 0]
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)
