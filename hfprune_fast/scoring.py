"""Run the model over token batches and add up every neuron's statistics.

The loss of a sequence is the mean of its positions' entropy; a micro-batch's loss is the sum over
its sequences, so each sequence's gradient is its own. The autograd graph begins at the input of the
first layer's down_proj: no parameter ever requires grad and nothing below it is differentiated. The
head runs through `linear_entropy`, which never holds all logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfprune_fast.architectures import ModelParts, parts_of
from hfprune_fast.errors import CalibrationError, NumericsError
from hfprune_fast.importance import STATISTICS
from hfprune_fast.kernels import TaylorStatistics, linear_entropy, taylor_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def score_batches(model: PreTrainedModel, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Score every MLP neuron of a loaded model over batches of token ids.

    Args:
        model: a causal language model of a known family, in float32, bfloat16 or float64; it is
            left as it was found.
        batches: (B, T) integer tensors of whole sequences.

    Returns:
        l1, l2, mask, act: (L, F) float64 sums, on the CPU; down_norm: (L, F) float64;
        samples, tokens: what was read; entropy_nats: the mean entropy of the model's output.

    Raises:
        NumericsError: NaN or inf in a weight or a layer's activations or gradients, named.
        CalibrationError: no batch, or token ids that the model does not have.
        UnsupportedModelError: no known gated MLP.
    """
    parts = parts_of(model)
    _check_weights(model)
    vocab = parts.head.weight.shape[0]
    shape = (len(parts.mlps), parts.mlps[0].gate.weight.shape[0])
    device = parts.head.weight.device
    total = torch.zeros(len(STATISTICS), *shape, dtype=torch.float64, device=device)
    samples = tokens = 0
    entropy_nats = 0.0
    with _left_as_found(model):
        for batch in batches:
            ids = torch.as_tensor(batch)
            _check_ids(ids, vocab)
            # Added only when the whole micro-batch is done and finite.
            staged, loss = _score_batch(parts, ids.to(device, torch.int64))
            _check_activations(staged, loss)
            total += staged
            entropy_nats += loss
            samples += ids.shape[0]
            tokens += ids.numel()
    if samples == 0:
        raise CalibrationError("no token batches to score with; expected at least one sequence")
    down_norm = torch.stack([_column_norms(mlp.down.weight) for mlp in parts.mlps])
    return {
        **dict(zip(STATISTICS, total.cpu().unbind(), strict=True)),
        "down_norm": down_norm.cpu(),
        "samples": samples,
        "tokens": tokens,
        "entropy_nats": entropy_nats / samples,
    }


def _score_batch(parts: ModelParts, ids: Tensor) -> tuple[Tensor, float]:
    """Return the micro-batch's (4, L, F) statistics and the sum of its sequences' losses."""
    statistics: list[TaylorStatistics | None] = [None] * len(parts.mlps)

    def watch(layer: int) -> Any:
        def at_down_proj(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            act = args[0]
            if layer == 0:
                act = act.detach().requires_grad_()
            held = act.detach()

            def at_gradient(grad: Tensor) -> None:
                statistics[layer] = taylor_statistics(grad, held)

            act.register_hook(at_gradient)
            return (act, *args[1:])

        return at_down_proj

    handles = [
        mlp.down.register_forward_pre_hook(watch(layer)) for layer, mlp in enumerate(parts.mlps)
    ]
    try:
        with torch.enable_grad():
            hidden = parts.decoder(input_ids=ids, use_cache=False).last_hidden_state
            flat = hidden.detach().flatten(0, 1)
            dtype = torch.promote_types(flat.dtype, torch.float32)
            row_weight = flat.new_full((len(flat),), 1 / ids.shape[1], dtype=dtype)
            loss, d_hidden = linear_entropy(
                flat, parts.head.weight, row_weight, bias=parts.head.bias
            )
            hidden.backward(d_hidden.view_as(hidden))
    finally:
        for handle in handles:
            handle.remove()
    stacked = [torch.stack(layer) for layer in statistics if layer is not None]
    assert len(stacked) == len(parts.mlps)
    return torch.stack(stacked, dim=1), float(loss)


@contextmanager
def _left_as_found(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside, both restored afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted_grad = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted_grad:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in wanted_grad:
            parameter.requires_grad_(True)


def _column_norms(weight: Tensor) -> Tensor:
    """2-norm of each column of (D, F), in fp64, a block of rows at a time."""
    squares = sum(block.double().square().sum(dim=0) for block in weight.detach().split(256))
    assert isinstance(squares, Tensor)
    return squares.sqrt()


def _check_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16:
            raise NumericsError(
                f"{name} is float16, in which these gradients underflow to zero; "
                "load the model in bfloat16 or float32"
            )
        extremes = torch.stack(torch.aminmax(parameter.detach()))
        if not bool(extremes.isfinite().all()):
            raise NumericsError(f"tensor {name} holds NaN or inf; the checkpoint is damaged")


def _check_activations(staged: Tensor, loss: float) -> None:
    acts_finite = staged[STATISTICS.index("act")].isfinite().all(dim=1)
    if not bool(acts_finite.all()):
        layer = int((~acts_finite).nonzero()[0])
        raise NumericsError(f"NaN or inf in the MLP activations of layer {layer}; try float32")
    if not torch.isfinite(torch.tensor(loss)):
        raise NumericsError("NaN or inf in the logits, after finite MLP activations; try float32")
    finite = staged.isfinite().all(dim=2).all(dim=0)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[-1])  # the backward meets the last layer first
        raise NumericsError(f"NaN or inf in the gradient at the MLP of layer {layer}; try float32")


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise CalibrationError(
            f"token batches must be non-empty (B, T) integers, got {tuple(ids.shape)} {ids.dtype}"
        )
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= vocab:
        raise CalibrationError(
            f"token ids must be in 0..{vocab - 1} (the vocabulary), got {low if low < 0 else high}"
        )
