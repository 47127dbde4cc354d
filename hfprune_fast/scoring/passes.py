"""Run the model over token batches and add up every neuron's statistics.

Micro-batches run in passes, layer by layer: forward through all layers, the head, which never
holds all logits (`linear_entropy`), and back, where `mlp_hooks` makes the statistics of each layer.
Each layer has an autograd graph of its own, kept from the forward or built again in the backward
(`recompute`); all criteria share it. No parameter requires grad, and nothing below the first
layer's MLP is differentiated.

A pass adds to a copy of the accumulator, layer by layer in the order of its micro-batches. So a
pass that ran out of memory, or was interrupted, adds nothing, and the sums do not depend on how
micro-batches are grouped into passes.

In float16 the gradients are scaled by a power of two, which is divided out of the statistics
exactly; if they overflow, the pass is run again with a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.layerwise import (
    OnProgress,
    ResidentModel,
    each_batch,
    for_each_layer,
    no_progress,
)
from hfprune_fast.engine.mlp_hooks import ScoredGraph, TaylorOptions, acts_of
from hfprune_fast.kernels import TaylorStatistics, taylor_statistics
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.criteria import CRITERIA

_SCALES_TRIED = 5  # in float16
_ACT = TaylorStatistics._fields.index("act")


@dataclass(frozen=True)
class PassOptions:
    """What a run sums, and how; options of the second kind change the sums only by rounding."""

    backend: str = "torch"
    criteria: tuple[str, ...] = ("entropy",)  # with a loss; if empty, only act is summed
    output_fisher: bool = False  # needs criterion fisher
    seed: int = 0  # of the tokens that fisher draws
    parity: bool = False  # round as the paper's code does; micro-batches must be one sequence
    recompute: bool = False  # keep a layer's input instead of its graph
    inputs_on_host: bool = False  # keep the layers' inputs in host memory
    pass_tokens: int = 0  # micro-batches are grouped into passes of up to this many tokens
    logits_budget_bytes: int | None = None


def empty_accumulator(model: ResidentModel, options: PassOptions) -> ScoreAccumulator:
    """Return an accumulator of zeros, on the model's device."""
    mlps, device = model.parts.mlps, model.device
    hidden = mlps[0].down.weight.shape[0]
    shape = len(mlps), max(mlp.width for mlp in mlps)
    criteria = max(1, len(options.criteria)), len(TaylorStatistics._fields)
    dtype = model.dtype if options.parity else torch.float64
    return ScoreAccumulator(
        torch.zeros(*criteria, *shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=torch.float64, device=device),
        torch.zeros(len(mlps), hidden, hidden, dtype=torch.float32)
        if options.output_fisher
        else None,
        loss_nats=(0.0,) * len(options.criteria),
    )


class Pass:
    """One pass of micro-batches forward through the model and back."""

    def __init__(
        self,
        model: ResidentModel,
        batches: list[MicroBatch],
        options: PassOptions,
        on_progress: OnProgress = no_progress,
    ) -> None:
        self.model, self.batches, self.options = model, batches, options
        self._reported = 0.0  # tokens
        self._on_progress = on_progress
        layers = len(model.parts.layers)
        self._steps = 2 * layers + 1 if options.criteria else layers
        self._scales = [1.0] * len(batches)  # of the gradients
        # Of each micro-batch, what returns the graph of each layer.
        self._graphs: list[list[Callable[[], ScoredGraph]]] = []
        self._masks = [
            None if batch.token_mask is None else batch.token_mask.to(model.device)
            for batch in batches
        ]

    def add_to(self, total: ScoreAccumulator) -> ScoreAccumulator:
        """Return the sums with this pass added, for the first gradient scale without overflow."""
        scaled = self.model.dtype == torch.float16 and not self.options.parity
        for attempt in range(_SCALES_TRIED if scaled else 1):
            self.clear()
            lengths = (batch.ids.shape[1] for batch in self.batches)
            self._scales = [gradient_scale(scaled, length, attempt) for length in lengths]
            new = self._run(total)
            if not new.gradient_overflowed():
                break
        new.check_finite()
        return replace(
            new,
            samples=total.samples + sum(len(batch.ids) for batch in self.batches),
            tokens=total.tokens + sum(batch.tokens for batch in self.batches),
        )

    def clear(self) -> None:
        """Free the graphs of the pass, and subtract the progress that it has reported."""
        self._graphs = [[] for _ in self.batches]
        self._on_progress(-self._reported)
        self._reported = 0.0

    def _run(self, total: ScoreAccumulator) -> ScoreAccumulator:
        model, names = self.model, self.options.criteria
        statistics, down_norm = total.statistics.clone(), total.down_norm.clone()
        hidden = [self._offload(model.begin(batch)) for batch in self.batches]

        def forward(layer: int) -> None:
            if total.samples == 0:
                norms = column_norms(model.parts.mlps[layer].down.weight)
                down_norm[layer, : len(norms)] = norms
            for i, _ in each_batch(self.batches, self._report, self._steps):
                if names:
                    hidden[i] = self._forward(layer, i, hidden[i])
                else:
                    hidden[i] = self._add_acts(layer, i, hidden[i], statistics[0, _ACT, layer])

        for_each_layer(model, forward, then=model.head_unit if names else 0)
        if not names:
            return ScoreAccumulator(statistics, down_norm)
        losses: list[list[Tensor]] = [[] for _ in names]
        grads: list[list[Tensor]] = [[] for _ in self.batches]  # one a criterion
        with model.weights_of(model.head_unit, then=model.head_unit - 1):
            for i, _ in each_batch(self.batches, self._report, self._steps):
                for of_criterion, name in zip(losses, names, strict=True):
                    loss, grad = self._head(i, name, hidden[i])
                    of_criterion.append(loss)
                    grads[i].append(grad)
        output_fisher = None if total.output_fisher is None else total.output_fisher.clone()

        def backward(layer: int) -> None:
            fisher = None if output_fisher is None else _Covariance(self.model)
            for i, _ in each_batch(self.batches, self._report, self._steps):
                grads[i] = self._backward(layer, i, grads[i], statistics[:, :, layer], fisher)
            if output_fisher is not None and fisher is not None:
                output_fisher[layer] += fisher.total.cpu()

        for_each_layer(model, backward, then=0, backward=True)
        # Read here, where the device is waited for anyway.
        summed = (
            sum(map(float, of_criterion), before)
            for of_criterion, before in zip(losses, total.loss_nats, strict=True)
        )
        return ScoreAccumulator(statistics, down_norm, output_fisher, loss_nats=tuple(summed))

    def _report(self, tokens: float) -> None:
        self._reported += tokens
        self._on_progress(tokens)

    def _forward(self, layer: int, i: int, hidden: Tensor) -> Tensor:
        """Return a layer's output, and keep what its backward needs."""
        if self.options.recompute:
            again = partial(self._graph, layer, i, hidden, only_backward=True)
            self._graphs[i].append(again)
            with torch.no_grad():
                return self._offload(self.model.run(layer, self._onload(hidden), self.batches[i]))
        graph = self._graph(layer, i, hidden, only_backward=False)
        self._graphs[i].append(lambda: graph)
        return graph.output.detach()

    @torch.no_grad()
    def _add_acts(self, layer: int, i: int, hidden: Tensor, act_sums: Tensor) -> Tensor:
        """Return a layer's output, and add its act to the sums, without any gradient."""
        with acts_of(self.model.parts.mlps[layer]) as acts:
            output = self.model.run(layer, self._onload(hidden), self.batches[i])
        mask, backend, act = self._masks[i], self.options.backend, acts[0]
        sums = taylor_statistics(act, act, token_mask=mask, backend=backend).act
        act_sums[: len(sums)] += sums
        return self._offload(output)

    def _graph(self, layer: int, i: int, hidden: Tensor, *, only_backward: bool) -> ScoredGraph:
        options, activation = self.options, self.model.activation(layer)
        return ScoredGraph(
            lambda h: self.model.run(layer, h, self.batches[i]),
            self._onload(hidden),
            self.model.parts.mlps[layer],
            TaylorOptions(
                self._masks[i], self._scales[i], options.parity, options.backend, activation
            ),
            needs_grad=layer > 0,
            only_backward=only_backward and not self.model.parts.family.norm_behind,
        )

    def _head(self, i: int, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the sequences' losses and the gradient at the last layer's output."""
        batch, head, criterion = self.batches[i], self.model.parts.head, CRITERIA[name]
        assert criterion.head_loss is not None
        hidden = self._onload(hidden).detach().requires_grad_()
        with torch.enable_grad():
            normed = self.model.parts.norm(hidden)
        loss, d_normed = criterion.head_loss(
            normed.flatten(0, 1),
            head.weight,
            criterion.row_weights(batch, self._masks[i], self.model.device).flatten(),
            batch,
            self.options.seed,
            bias=head.bias,
            grad_scale=self._scales[i],
            logits_budget_bytes=self.options.logits_budget_bytes,
            backend=self.options.backend,
            **self.model.parts.logits.options,
        )
        normed.backward(d_normed.view_as(normed))
        assert hidden.grad is not None
        return loss, self._offload(hidden.grad)

    def _backward(
        self,
        layer: int,
        i: int,
        d_outputs: list[Tensor],
        statistics: Tensor,
        fisher: _Covariance | None,
    ) -> list[Tensor]:
        """Return the gradients at a layer's input, and add to its statistics (C, 4, F).

        The gradients are one a criterion; those at the first layer's input are unused. `fisher` is
        given that of criterion fisher at down_proj's output.
        """
        graph, d_inputs = self._graphs[i].pop()(), []
        for c, d_output in enumerate(d_outputs):
            add, last = partial(_add, statistics[c]), c == len(d_outputs) - 1
            take_gradient = None
            if fisher is not None and self.options.criteria[c] == "fisher":
                take_gradient = partial(fisher.add, self.batches[i], self._scales[i])
            d_input = graph.backward(
                self._onload(d_output), add, take_gradient=take_gradient, last=last
            )
            d_inputs.append(d_output if d_input is None else self._offload(d_input))
        return d_inputs

    def _offload(self, tensor: Tensor) -> Tensor:
        """Return what is kept of a tensor until the other micro-batches have run too."""
        if not self.options.inputs_on_host:
            return tensor
        # The copies are ordered by the device's stream, so nothing waits for them here.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return pinned.copy_(tensor, non_blocking=True)

    def _onload(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, non_blocking=True)


class _Covariance:
    """Σ g gᵀ over tokens, (D, D) fp32 at least, g of log p(y) at the output of down_proj.

    There, and not at the layer's output, since a norm or a scale may follow.
    """

    def __init__(self, model: ResidentModel) -> None:
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.total = torch.zeros((), dtype=dtype, device=model.device)

    def add(self, batch: MicroBatch, scale: float, grad: Tensor) -> None:
        """Add a micro-batch's gradients, times its length: the loss of a sequence is a mean."""
        wide = grad.to(self.total.dtype)
        lengths = torch.tensor(batch.lengths, dtype=wide.dtype, device=wide.device)
        rows = (wide * (lengths / scale)[:, None, None]).flatten(0, 1)
        self.total = self.total + rows.t() @ rows


def _add(sums: Tensor, statistics: TaylorStatistics) -> None:
    """Add one layer's statistics to its sums (4, F), which are as wide as the widest layer's."""
    added = torch.stack(statistics)
    sums[:, : added.shape[1]].add_(added)


def gradient_scale(scaled: bool, seq_len: int, attempt: int) -> float:
    """Return the power of two by which a micro-batch's gradients are multiplied."""
    if not scaled:
        return 1.0
    # 64 to 128 in each row of the loss, whatever the length; a sixteenth at each new attempt.
    return float(2.0 ** (6 + math.ceil(math.log2(seq_len)) - 4 * attempt))


def column_norms(weight: Tensor) -> Tensor:
    """Return the 2-norm of each column of a (D, F) weight, fp64, a block of rows at a time."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.detach().split(256):
        squares += block.double().square().sum(dim=0)
    return squares.sqrt()
