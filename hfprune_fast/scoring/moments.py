"""Norms and second moments of weights, activations and gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import NumericsError
from hfprune_fast.models.sites import ModelParts

# A product of a matrix with itself is symmetric: its blocks below the diagonal are not made. They
# are as few as leaves the products large, which a GPU needs more than half of the terms.
_MIN_BLOCK, _MAX_BLOCKS = 128, 8


def add_gram(
    gram: Tensor, rows: Tensor, weighted: Tensor | None = None, factor: float = 1.0
) -> None:
    """Add factor · rowsᵀ rows to the blocks of `gram` (F, F) on and above its diagonal.

    Args:
        rows: (n, F); multiplied in fp32 at least, unless the products of their dtype are exact.
        weighted: the same rows, each times its weight, both in fp32 at least; None weighs all
            alike.

    After the last rows, `mirror` fills the blocks below.
    """
    if weighted is None and not has_exact_products(rows):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    left = rows if weighted is None else weighted
    for begin, end in _blocks(len(gram)):
        made = product(left[:, begin:end], rows[:, begin:])
        gram[begin:end, begin:].add_(made, alpha=factor)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ right, (F, G), of rows (n, F) and (n, G): in their dtype, or in fp32."""
    if has_exact_products(left):
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.t() @ right


def has_exact_products(rows: Tensor) -> bool:
    """Return whether a matrix unit multiplies such rows exactly and adds up in fp32.

    In fp32 an NVIDIA GPU, which has no unit for it, would take ten times as long.
    """
    halves = rows.dtype in (torch.bfloat16, torch.float16)
    return halves and rows.is_cuda and torch.version.hip is None


def mirror(gram: Tensor) -> Tensor:
    """Copy the blocks above the diagonal to those below, in place, and return the matrix."""
    for begin, end in _blocks(len(gram)):
        gram[end:, begin:end] = gram[begin:end, end:].t()
    return gram


def _blocks(width: int) -> Iterator[tuple[int, int]]:
    size = max(_MIN_BLOCK, -(-width // _MAX_BLOCKS))
    for begin in range(0, width, size):
        yield begin, min(begin + size, width)


def covariance_outputs(parts: ModelParts) -> list[tuple[int, bool]]:
    """Return (layer, whether of its experts) of each output that has a covariance, in order."""
    kinds: list[tuple[bool, Collection[int]]] = [
        (False, parts.own_mlps),
        (True, parts.with_experts),
    ]
    layers = range(len(parts.layers))
    return [(layer, of_experts) for layer in layers for of_experts, its in kinds if layer in its]


class OutputCovariance:
    """Σ g gᵀ over tokens, (D, D) fp32 at least, g of log p(y) at the output of an MLP or experts.

    There, and not at the layer's output, since a norm or a scale may follow.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self._sum = torch.zeros(hidden_size, hidden_size, dtype=wide, device=device)

    def add(self, batch: MicroBatch, scale: float, grad: Tensor) -> None:
        """Add a micro-batch's gradients, times its length: the loss of a sequence is a mean."""
        sequences = grad.reshape(*batch.ids.shape, -1)
        whole = len(set(batch.lengths)) == 1  # one product: all tokens have one weight
        parts = [sequences.flatten(0, 1)] if whole else sequences.unbind()
        for length, part in zip(batch.lengths, parts, strict=not whole):
            add_gram(self._sum, part, factor=(length / scale) ** 2)

    def total(self) -> Tensor:
        """Return the sum, to which nothing is added any more."""
        return mirror(self._sum)


def column_norms(weight: Tensor) -> Tensor:
    """Return the 2-norm of each column of a (D, F) weight, fp64, a block of rows at a time."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.detach().split(256):
        squares += block.double().square().sum(dim=0)
    return squares.sqrt()


def token_rows(tensor: Tensor, batch: MicroBatch) -> Tensor:
    """Return (tokens, ...) of a (B, T, ...) tensor, without padding."""
    mask = batch.token_mask
    return tensor.flatten(0, 1) if mask is None else tensor[mask.to(tensor.device)]


def moments_dtype(model: ResidentModel) -> torch.dtype:
    """Return the dtype in which a batch's second moments are multiplied: fp32 at least."""
    return torch.promote_types(model.dtype, torch.float32)


def check_moments(gram: Tensor, layer: int) -> None:
    """Raise NumericsError if the second moments of a layer's acts hold NaN or inf."""
    if not bool(gram.diagonal().isfinite().all()):
        raise NumericsError(f"NaN or inf in the MLP activations of layer {layer}; try float32")
