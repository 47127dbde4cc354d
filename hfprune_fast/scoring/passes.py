"""Run the model over token batches and add up every neuron's statistics.

The loss of a sequence is the mean over its positions of what the criterion says of the model's
output distribution p there:

    entropy         H(p), the paper's
    cross_entropy   -log p(y), y the next token; the last position has none
    fisher          -log p(y), y drawn from p: its gradient's second moments are those of the
                    Fisher information, so half of them is the second-order KL(dense || pruned)

A micro-batch's loss is the sum over its sequences, so each sequence's gradient is its own. Several
criteria share the forward. Without any, only act is added up and nothing is differentiated.

Micro-batches run in passes, layer by layer: forward through all layers, the head, which never
holds all logits (`linear_entropy`), and back, where `gated_mlp` adds up each layer. Each layer has
a small autograd graph of its own, from its input to its output, kept from the forward or made
again in the backward (`recompute`). No parameter ever requires grad and nothing below the first
layer's MLP is differentiated.

A pass adds to a copy of the totals, layer by layer in the order of its micro-batches, and the copy
takes the totals' place when the pass is whole and finite. So a pass that ran out of memory, or was
interrupted, counts nothing, and the totals do not depend on how micro-batches are put into passes.

In float16 the gradients carry a power of two, which the statistics take out again, exactly; where
it overflows, the pass is run again with a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import Scoring, acts_of, scored
from hfprune_fast.errors import NumericsError
from hfprune_fast.kernels import (
    TaylorStatistics,
    linear_cross_entropy,
    linear_entropy,
    linear_fisher,
    taylor_statistics,
)
from hfprune_fast.scoring.resume import Totals


@dataclass(frozen=True)
class How:
    """What a run adds up, and how it goes about it, which changes the sums by rounding at most."""

    backend: str = "torch"
    criteria: tuple[str, ...] = ("entropy",)  # of CRITERIA; none of them: only act
    seed: int = 0  # of the tokens that fisher draws
    parity: bool = False  # round as the paper's code does; micro-batches must be one sequence
    recompute: bool = False  # keep a layer's input instead of its graph
    inputs_on_host: bool = False  # keep the layers' inputs in host memory
    pass_tokens: int = 0  # micro-batches are put together into passes up to this many tokens
    logits_budget_bytes: int | None = None


def no_totals(model: ResidentModel, how: How, output_fisher: bool = False) -> Totals:
    """Return the totals of no sequence, on the model's device."""
    mlps, device = model.parts.mlps, model.device
    width, hidden = max(mlp.gate.weight.shape[0] for mlp in mlps), mlps[0].down.weight.shape[0]
    shape = len(mlps), width
    criteria = max(1, len(how.criteria)), len(TaylorStatistics._fields)
    dtype = model.dtype if how.parity else torch.float64
    return Totals(
        torch.zeros(*criteria, *shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=torch.float64, device=device),
        torch.zeros(len(mlps), hidden, hidden) if output_fisher else None,
        loss_nats=(0.0,) * len(how.criteria),
    )


class _Pass:
    """One pass of micro-batches through the model and back."""

    def __init__(
        self,
        model: ResidentModel,
        batches: list[MicroBatch],
        how: How,
        done: Callable[[float], object],
    ) -> None:
        self.model, self.batches, self.how, self.done = model, batches, how, done
        self.layers = len(model.parts.layers)
        self.counted = 0.0
        self._criterion = 0  # whose backward runs
        # Of each micro-batch, the layers' inputs and, unless recomputing, outputs.
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[list[Tensor]] = []
        self.masks = [
            None if batch.token_mask is None else batch.token_mask.to(model.device)
            for batch in batches
        ]

    def add_to(self, totals: Totals) -> Totals:
        """Return the totals with this pass added, for the first gradient scale without overflow."""
        for attempt in range(5 if self.model.dtype == torch.float16 and not self.how.parity else 1):
            self.done(-self.counted)
            self.clear()
            new = self._run(totals, attempt)
            if bool(new.statistics.isfinite().all()) or not all(map(math.isfinite, new.loss_nats)):
                break
        _check_finite(new.statistics, sum(new.loss_nats))
        return replace(
            new,
            samples=totals.samples + sum(len(batch.ids) for batch in self.batches),
            tokens=totals.tokens + sum(batch.tokens for batch in self.batches),
        )

    def clear(self) -> None:
        """Let go of what the pass holds."""
        self.inputs = [[] for _ in self.batches]
        self.outputs = [[] for _ in self.batches]
        self.counted = 0.0

    def _run(self, totals: Totals, attempt: int) -> Totals:
        model, criteria = self.model, range(len(self.how.criteria))
        staged, down_norm = totals.statistics.clone(), totals.down_norm.clone()
        scales = [self._grad_scale(batch, attempt) for batch in self.batches]
        hidden = [self._hold(model.begin(batch)) for batch in self.batches]
        for layer in range(self.layers):
            with model.weights_of(
                layer, then=(layer + 1) if criteria else (layer + 1) % self.layers
            ):
                if totals.samples == 0:
                    norms = column_norms(model.parts.mlps[layer].down.weight)
                    down_norm[layer, : len(norms)] = norms
                for i in self._each():
                    hidden[i] = self._forward(layer, i, hidden[i], staged[:, :, layer], scales[i])
        if not criteria:
            return Totals(staged, down_norm)
        losses: list[list[Tensor]] = [[] for _ in criteria]
        grads: list[list[Tensor]] = [[] for _ in self.batches]  # one a criterion
        with model.weights_of(self.layers, then=self.layers - 1):
            for i in self._each():
                for c in criteria:
                    loss, grad = self._head(i, c, hidden[i], scales[i])
                    losses[c].append(loss)
                    grads[i].append(grad)
        output_fisher = None if totals.output_fisher is None else totals.output_fisher.clone()
        for layer in reversed(range(self.layers)):
            with model.weights_of(layer, then=max(0, layer - 1)):
                if output_fisher is not None:
                    output_fisher[layer] += self._output_fisher(grads, scales).cpu()
                for i in self._each():
                    grads[i] = self._backward(layer, i, grads[i], staged[:, :, layer], scales[i])
        # Read here, where the device is waited for anyway.
        summed = [
            sum(map(float, of_one), before)
            for of_one, before in zip(losses, totals.loss_nats, strict=True)
        ]
        return Totals(staged, down_norm, output_fisher, loss_nats=tuple(summed))

    def _output_fisher(self, grads: list[list[Tensor]], scales: list[float]) -> Tensor:
        """Return Σ g gᵀ over the tokens, g of log p(y) at a layer's output, which its MLP adds to.

        (D, D), at least fp32. The loss of a sequence is a mean, so g is its length times more.
        """
        fisher, dtype = self.how.criteria.index("fisher"), self.model.dtype
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32))
        for batch, of_batch, scale in zip(self.batches, grads, scales, strict=True):
            grad = self._brought(of_batch[fisher]).to(total.dtype)
            lengths = torch.tensor(batch.lengths, dtype=grad.dtype, device=grad.device)
            rows = (grad * (lengths / scale)[:, None, None]).flatten(0, 1)
            total = total.to(rows.device) + rows.t() @ rows
        return total

    def _each(self) -> Iterator[int]:
        """Number of each micro-batch, which has been worked on in one of the layers or the head."""
        for i, batch in enumerate(self.batches):
            yield i
            tokens = batch.tokens / (2 * self.layers + 1 if self.how.criteria else self.layers)
            self.counted += tokens
            self.done(tokens)

    def _grad_scale(self, batch: MicroBatch, attempt: int) -> float:
        if self.model.dtype != torch.float16 or self.how.parity:
            return 1.0
        # 64 to 128 in each row of the loss, whatever the length; a sixteenth each time it is run.
        return float(2.0 ** (6 + math.ceil(math.log2(batch.ids.shape[1])) - 4 * attempt))

    def _forward(self, layer: int, i: int, hidden: Tensor, staged: Tensor, scale: float) -> Tensor:
        if not self.how.criteria:
            return self._only_forward(layer, i, hidden, staged)
        if self.how.recompute:
            self.inputs[i].append(hidden)
            with torch.no_grad():
                return self._hold(self.model.run(layer, self._brought(hidden), self.batches[i]))
        self._with_graph(layer, i, hidden, staged, scale, only_backward=False)
        return self.outputs[i][-1].detach()

    @torch.no_grad()
    def _only_forward(self, layer: int, i: int, hidden: Tensor, staged: Tensor) -> Tensor:
        with acts_of(self.model.parts.mlps[layer]) as acts:
            output = self.model.run(layer, self._brought(hidden), self.batches[i])
        (act,) = acts
        sums = taylor_statistics(act, act, token_mask=self.masks[i], backend=self.how.backend)
        act_row = staged[0, TaylorStatistics._fields.index("act")]
        act_row[: len(sums.act)] += sums.act
        return self._hold(output)

    def _with_graph(
        self, layer: int, i: int, hidden: Tensor, staged: Tensor, scale: float, only_backward: bool
    ) -> None:
        """Run a layer with an autograd graph from its input to its output, which are kept."""

        def take(statistics: TaylorStatistics) -> None:
            added = torch.stack(statistics)
            # The columns of this layer's neurons.
            staged[self._criterion, :, : added.shape[1]].add_(added)

        def is_last() -> bool:
            return self._criterion == len(self.how.criteria) - 1

        needs_grad = layer > 0
        scoring = Scoring(take, self.masks[i], scale, self.how.parity, self.how.backend, is_last)
        hidden = hidden.detach().requires_grad_(needs_grad)
        mlp = self.model.parts.mlps[layer]
        with (
            torch.enable_grad(),
            scored(mlp, scoring, needs_grad=needs_grad, only_backward=only_backward),
        ):
            output = self.model.run(layer, hidden, self.batches[i])
        self.inputs[i].append(hidden)
        self.outputs[i].append(output)

    def _head(self, i: int, c: int, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the sum of the sequences' losses and the gradient at the last layer's output."""
        batch, head = self.batches[i], self.model.parts.head
        criterion = self.how.criteria[c]
        hidden = self._brought(hidden).detach().requires_grad_()
        with torch.enable_grad():
            normed = self.model.parts.norm(hidden)
        unlabelled = criterion == "cross_entropy"  # the last position of each sequence
        row_weight = torch.tensor(
            [1 / max(1, n - unlabelled) for n in batch.lengths], dtype=torch.float64
        )
        row_weight = row_weight[:, None].expand(batch.ids.shape).to(self.model.device)
        mask = self.masks[i]
        if mask is not None:
            row_weight = row_weight * mask
        rows, weights = normed.flatten(0, 1), row_weight.flatten()
        options: dict[str, Any] = {
            "bias": head.bias,
            "grad_scale": scale,
            "logits_budget_bytes": self.how.logits_budget_bytes,
            "backend": self.how.backend,
        }
        if criterion == "entropy":
            loss, d_normed = linear_entropy(rows, head.weight, weights, **options)
        elif criterion == "cross_entropy":
            labels = batch.labels.flatten().to(self.model.device)
            loss, d_normed = linear_cross_entropy(rows, head.weight, labels, weights, **options)
        else:
            ids = batch.row_ids.flatten().to(self.model.device)
            loss, d_normed = linear_fisher(
                rows, head.weight, ids, weights, seed=self.how.seed, **options
            )
        normed.backward(d_normed.view_as(normed))
        assert hidden.grad is not None
        return loss, self._hold(hidden.grad)

    def _backward(
        self, layer: int, i: int, d_outputs: list[Tensor], staged: Tensor, scale: float
    ) -> list[Tensor]:
        """Return the gradients at a layer's input; nothing of use at the first's."""
        if self.how.recompute:
            hidden = self._brought(self.inputs[i].pop())
            self._with_graph(layer, i, hidden, staged, scale, only_backward=True)
        hidden, output = self.inputs[i].pop(), self.outputs[i].pop()
        d_inputs = []
        for self._criterion, d_output in enumerate(d_outputs):
            another = self._criterion < len(d_outputs) - 1
            output.backward(self._brought(d_output), retain_graph=another)
            d_inputs.append(d_output if hidden.grad is None else self._hold(hidden.grad))
            hidden.grad = None
        return d_inputs

    def _hold(self, tensor: Tensor) -> Tensor:
        """Put away what is needed again when a layer has run for all micro-batches."""
        if not self.how.inputs_on_host:
            return tensor
        # The copies are ordered by the device's stream, so nothing waits for them here.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return pinned.copy_(tensor, non_blocking=True)

    def _brought(self, tensor: Tensor) -> Tensor:
        """Return what was put away, on the device."""
        return tensor.to(self.model.device, non_blocking=True)


def column_norms(weight: Tensor) -> Tensor:
    """Return the 2-norm of each column of a (D, F) weight, fp64, a block of rows at a time."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.detach().split(256):
        squares += block.double().square().sum(dim=0)
    return squares.sqrt()


def _check_finite(staged: Tensor, loss: float) -> None:
    """Name where NaN or inf appeared first: forward through the layers, the head, and back."""
    statistics = TaylorStatistics(*staged.isfinite().all(dim=3).all(dim=0).unbind())
    if not bool(statistics.act.all()):
        layer = int((~statistics.act).nonzero()[0])
        raise NumericsError(f"NaN or inf in the MLP activations of layer {layer}; try float32")
    if not math.isfinite(loss):
        raise NumericsError("NaN or inf in the logits, after finite MLP activations; try float32")
    finite = torch.stack(statistics).all(dim=0)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[-1])  # the backward meets the last layer first
        raise NumericsError(f"NaN or inf in the gradient at the MLP of layer {layer}; try float32")
