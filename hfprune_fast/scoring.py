"""Run the model over token batches and add up every neuron's statistics.

The loss of a sequence is the mean of its positions' entropy; a micro-batch's loss is the sum over
its sequences, so each sequence's gradient is its own. The autograd graph begins at the input of the
first layer's down_proj: no parameter ever requires grad and nothing below it is differentiated. The
head runs through `linear_entropy`, which never holds all logits, and `taylor_statistics` adds up
each layer as its gradient arrives.

In float16 the gradients carry a power of two, which the statistics take out again, exactly; where
it overflows, the micro-batch is run again with a smaller one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.architectures import ModelParts, parts_of
from hfprune_fast.errors import ArgumentError, CalibrationError, NumericsError
from hfprune_fast.forward import check_ids, check_model, final_hidden, left_as_found
from hfprune_fast.kernels import (
    TaylorStatistics,
    linear_entropy,
    resolve_backend,
    taylor_statistics,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scored:
    """What one run over the batches adds up to."""

    statistics: TaylorStatistics  # (L, F) fp64 each, on the CPU
    down_norm: Tensor  # (L, F) fp64: 2-norm of each neuron's down_proj column
    samples: int
    tokens: int
    entropy_nats: float  # mean over the samples
    data_sha256: str  # of each sequence's length and ids, so of the data and not of its batches
    backend: str  # "triton" or "torch"


def score_batches(
    model: PreTrainedModel,
    batches: Iterable[Any],
    *,
    backend: str | None = None,
    parity: bool = False,
) -> Scored:
    """Score every MLP neuron of a loaded model over batches of token ids.

    Args:
        model: a causal language model of a known family, on one device; it is left as it was found.
        batches: (B, T) integer tensors or arrays of whole sequences.
        backend: "triton" or "torch"; by default what HFPRUNE_BACKEND says, else triton on a GPU and
            torch elsewhere.
        parity: one sequence at a time, with products and totals rounded to the model's dtype, as
            the reference implementation does, in plain torch.

    Raises:
        ArgumentError: a model spread over devices, or a backend that cannot run.
        NumericsError: NaN or inf in a weight or a layer's activations or gradients, named.
        CalibrationError: no batch, or token ids that the model does not have.
        UnsupportedModelError: no known gated MLP.
    """
    parts = parts_of(model)
    check_model(model)
    head = parts.head.weight
    backend = backend_for(head, backend, parity)
    shape = (len(TaylorStatistics._fields), len(parts.mlps), parts.mlps[0].gate.weight.shape[0])
    dtype = head.dtype if parity else torch.float64
    total = torch.zeros(shape, dtype=dtype, device=head.device)
    samples = tokens = 0
    entropy_nats = 0.0
    digest = hashlib.sha256()
    with left_as_found(model):
        for batch in batches:
            ids = check_ids(batch, head.shape[0])
            for part in ids.split(1 if parity else len(ids)):
                # Added only when the whole micro-batch is done and finite.
                staged, loss = _finite_scores(parts, part, backend, parity)
                total += staged
                entropy_nats += loss
            samples += ids.shape[0]
            tokens += ids.numel()
            for row in ids.cpu().numpy().astype("<i8"):
                digest.update(f"{len(row)}:".encode() + row.tobytes())
    if samples == 0:
        raise CalibrationError("no token batches to score with; expected at least one sequence")
    down_norm = torch.stack([column_norms(mlp.down.weight) for mlp in parts.mlps])
    return Scored(
        statistics=TaylorStatistics(*total.double().cpu().unbind()),
        down_norm=down_norm.cpu(),
        samples=samples,
        tokens=tokens,
        entropy_nats=entropy_nats / samples,
        data_sha256=digest.hexdigest(),
        backend=backend,
    )


def backend_for(tensor: Tensor, backend: str | None, parity: bool) -> str:
    """Return the backend that will score a model whose weights are like tensor."""
    try:
        chosen = resolve_backend(backend or ("torch" if parity else None), tensor)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if parity and chosen == "triton":
        raise ArgumentError("parity rounds as plain torch does; backend must be torch, got triton")
    return chosen


def _finite_scores(
    parts: ModelParts, ids: Tensor, backend: str, parity: bool
) -> tuple[Tensor, float]:
    """Return `_score_batch`'s result for the first gradient scale that does not overflow."""
    scales = [1.0]
    if parts.head.weight.dtype == torch.float16 and not parity:
        # 64 to 128 in each row of the loss, whatever the length; a sixteenth each time it is run.
        first = 2.0 ** (6 + math.ceil(math.log2(ids.shape[1])))
        scales = [first / 16**attempt for attempt in range(5)]
    for grad_scale in scales:
        staged, loss = _score_batch(parts, ids, backend, parity, grad_scale)
        if bool(staged.isfinite().all()) or not math.isfinite(loss):
            break
    _check_finite(staged, loss)
    return staged, loss


def _score_batch(
    parts: ModelParts, ids: Tensor, backend: str, parity: bool, grad_scale: float
) -> tuple[Tensor, float]:
    """Return the micro-batch's (4, L, F) statistics and the sum of its sequences' losses."""
    statistics: dict[int, TaylorStatistics] = {}

    def watch(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def at_down_proj(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            act = args[0]
            if layer == 0:
                act = act.detach().requires_grad_()
            held = act.detach()

            def at_gradient(grad: Tensor) -> None:
                statistics[layer] = taylor_statistics(
                    grad, held, parity=parity, grad_scale=grad_scale, backend=backend
                )

            act.register_hook(at_gradient)
            return (act, *args[1:])

        return at_down_proj

    handles = [
        mlp.down.register_forward_pre_hook(watch(layer)) for layer, mlp in enumerate(parts.mlps)
    ]
    try:
        with torch.enable_grad():
            hidden = final_hidden(parts, ids)
            flat = hidden.detach().flatten(0, 1)
            row_weight = flat.new_full((len(flat),), 1 / ids.shape[1], dtype=torch.float64)
            loss, d_hidden = linear_entropy(
                flat,
                parts.head.weight,
                row_weight,
                bias=parts.head.bias,
                grad_scale=grad_scale,
                backend=backend,
            )
            hidden.backward(d_hidden.view_as(hidden))
    finally:
        for handle in handles:
            handle.remove()
    layers = [torch.stack(statistics[layer]) for layer in range(len(parts.mlps))]
    return torch.stack(layers, dim=1), float(loss)


def column_norms(weight: Tensor) -> Tensor:
    """Return the 2-norm of each column of a (D, F) weight, fp64, a block of rows at a time."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.detach().split(256):
        squares += block.double().square().sum(dim=0)
    return squares.sqrt()


def _check_finite(staged: Tensor, loss: float) -> None:
    """Name where NaN or inf appeared first: forward through the layers, the head, and back."""
    statistics = TaylorStatistics(*staged.isfinite().all(dim=2).unbind())
    if not bool(statistics.act.all()):
        layer = int((~statistics.act).nonzero()[0])
        raise NumericsError(f"NaN or inf in the MLP activations of layer {layer}; try float32")
    if not math.isfinite(loss):
        raise NumericsError("NaN or inf in the logits, after finite MLP activations; try float32")
    finite = torch.stack(statistics).all(dim=0)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[-1])  # the backward meets the last layer first
        raise NumericsError(f"NaN or inf in the gradient at the MLP of layer {layer}; try float32")
