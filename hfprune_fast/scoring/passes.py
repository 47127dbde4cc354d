"""Run the model over token batches and add up every neuron's statistics.

Micro-batches run in passes, layer by layer: forward through all layers, the head, which never
holds all logits (`linear_entropy`), and back, where `mlp_hooks` makes the statistics of each layer.
Each layer has an autograd graph of its own, kept from the forward or built again in the backward
(`recompute`); all criteria share it. No parameter requires grad, and nothing below the first
layer's MLP is differentiated.

A pass writes its sums beside those before it, layer by layer in the order of its micro-batches. So
a pass that ran out of memory, or was interrupted, adds nothing, and the sums do not depend on how
micro-batches are grouped into passes. Two tables take turns, and none is copied as a whole.

In float16 the gradients are scaled by a power of two, which is divided out of the statistics
exactly; if they overflow, the pass is run again with a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.expert_hooks import plain_experts, visited_experts
from hfprune_fast.engine.layerwise import (
    OnProgress,
    ResidentModel,
    each_batch,
    for_each_layer,
    no_progress,
    on_host,
)
from hfprune_fast.engine.mlp_hooks import TaylorOptions, in_sequences, inputs_of
from hfprune_fast.engine.routing import Routing, Rows
from hfprune_fast.engine.scored_graph import ScoredGraph
from hfprune_fast.kernels import TaylorStatistics, taylor_statistics
from hfprune_fast.models.experts import ExpertsMLP
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.criteria import CRITERIA
from hfprune_fast.scoring.moments import OutputCovariance
from hfprune_fast.scoring.sums import PassOptions, PassSums

_SCALES_TRIED = 5  # in float16


class Pass:
    """One pass of micro-batches forward through the model and back."""

    def __init__(
        self,
        model: ResidentModel,
        batches: list[MicroBatch],
        options: PassOptions,
        on_progress: OnProgress = no_progress,
        spare: ScoreAccumulator | None = None,
    ) -> None:
        self.model, self.batches, self.options = model, batches, options
        self._spare = spare  # see `PassSums`
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
        new.check_finite(self.model.parts.widths)
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
        sums = PassSums(total, model.parts, self._spare)
        hidden = [self._offload(model.begin(batch)) for batch in self.batches]

        def forward(layer: int) -> None:
            if total.samples == 0:
                sums.add_norms(layer)
            for i, _ in each_batch(self.batches, self._report, self._steps):
                if names:
                    hidden[i] = self._forward(layer, i, hidden[i])
                else:
                    hidden[i] = self._add_acts(layer, i, hidden[i], sums)

        for_each_layer(model, forward, then=model.head_unit if names else 0)
        if not names:
            return sums.result()
        losses: list[list[Tensor]] = [[] for _ in names]
        grads: list[list[Tensor]] = [[] for _ in self.batches]  # one a criterion
        with model.weights_of(model.head_unit, then=model.head_unit - 1):
            for i, _ in each_batch(self.batches, self._report, self._steps):
                for of_criterion, name in zip(losses, names, strict=True):
                    loss, grad = self._head(i, name, hidden[i])
                    of_criterion.append(loss)
                    grads[i].append(grad)

        def backward(layer: int) -> None:
            covariances = sums.covariances(layer, model.dtype)
            for i, _ in each_batch(self.batches, self._report, self._steps):
                grads[i] = self._backward(layer, i, grads[i], sums, covariances)
            sums.add_covariances(layer, covariances)

        for_each_layer(model, backward, then=0, backward=True)
        # Read here, where the device is waited for anyway.
        summed = (
            sum(map(float, of_criterion), before)
            for of_criterion, before in zip(losses, total.loss_nats, strict=True)
        )
        return sums.result(tuple(summed))

    def _report(self, tokens: float) -> None:
        self._reported += tokens
        self._on_progress(tokens)

    def _forward(self, layer: int, i: int, hidden: Tensor) -> Tensor:
        """Return a layer's output, and keep what its backward needs."""
        if self.options.recompute:
            again = partial(self._graph, layer, i, hidden, only_backward=True)
            self._graphs[i].append(again)
            batch, experts = self.batches[i], self.model.parts.experts[layer]
            with torch.no_grad(), plain_experts(experts, self._masks[i], len(batch.ids)):
                return self._offload(self.model.run(layer, self._onload(hidden), batch))
        graph = self._graph(layer, i, hidden, only_backward=False)
        self._graphs[i].append(lambda: graph)
        return graph.output.detach()

    @torch.no_grad()
    def _add_acts(self, layer: int, i: int, hidden: Tensor, sums: PassSums) -> Tensor:
        """Return a layer's output, and add its act to the sums, without any gradient."""
        parts, backend, mask = self.model.parts, self.options.backend, self._masks[i]
        mlp, experts, sequences = parts.mlps[layer], parts.experts[layer], len(self.batches[i].ids)
        acts: list[Tensor] = []
        with ExitStack() as hooks:
            if mlp is not None:
                acts = hooks.enter_context(inputs_of(mlp.down))
            routing = None if experts is None else Routing.of(experts)
            if experts is not None and routing is not None:
                visit = partial(_add_expert_acts, sums, layer, experts, routing, backend)
                hooks.enter_context(visited_experts(experts, visit, mask, sequences))
            output = self.model.run(layer, self._onload(hidden), self.batches[i])
        sums.add_routing(layer, routing)
        for act in (in_sequences(each, sequences) for each in acts):
            of_all = taylor_statistics(act, act, token_mask=mask, backend=backend)
            sums.add_act(layer, of_all.act)
        return self._offload(output)

    def _graph(self, layer: int, i: int, hidden: Tensor, *, only_backward: bool) -> ScoredGraph:
        options, parts = self.options, self.model.parts
        activation, experts_activation = self.model.activations(layer)
        alone = parts.experts[layer] is None and not parts.family.norm_behind
        return ScoredGraph(
            lambda h: self.model.run(layer, h, self.batches[i]),
            self._onload(hidden),
            parts.mlps[layer],
            TaylorOptions(
                self._masks[i], self._scales[i], options.parity, options.backend,
                activation, experts_activation, len(self.batches[i].ids),
            ),
            experts=parts.experts[layer],
            needs_grad=layer > 0,
            only_backward=only_backward and alone,
        )  # fmt: skip

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
        sums: PassSums,
        covariances: dict[bool, OutputCovariance],
    ) -> list[Tensor]:
        """Return the gradients at a layer's input, and add to its statistics.

        The gradients are one a criterion; those at the first layer's input are unused. The
        covariances are given those of criterion fisher at the outputs of the MLP and the experts.
        """
        graph, d_inputs, batch = self._graphs[i].pop()(), [], self.batches[i]
        sums.add_routing(layer, graph.routing)
        for c, d_output in enumerate(d_outputs):
            of_fisher = covariances if self.options.criteria[c] == "fisher" else {}
            own, of_experts = (
                partial(of_fisher[of].add, batch, self._scales[i]) if of in of_fisher else None
                for of in (False, True)
            )
            d_input = graph.backward(
                self._onload(d_output),
                partial(sums.add, layer, c),
                take_gradient=own,
                take_expert=partial(_add_expert, sums, layer, c),
                take_experts_gradient=of_experts,
                last=c == len(d_outputs) - 1,
            )
            d_inputs.append(d_output if d_input is None else self._offload(d_input))
        return d_inputs

    def _offload(self, tensor: Tensor) -> Tensor:
        """Return what is kept of a tensor until the other micro-batches have run too."""
        return on_host(tensor) if self.options.inputs_on_host else tensor

    def _onload(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, non_blocking=True)


def _add_expert(
    sums: PassSums,
    layer: int,
    criterion: int,
    expert: int,
    statistics: TaylorStatistics,
    taylor: Tensor,
) -> None:
    sums.add((layer, expert), criterion, statistics)
    sums.add_taylor(layer, expert, criterion, taylor)


def _add_expert_acts(
    sums: PassSums,
    layer: int,
    experts: ExpertsMLP,
    routing: Routing,
    backend: str,
    rows: Rows,
    x: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return an expert's output, and add its acts to the sums."""
    act = experts.act(experts.gate_up(rows.expert, x))
    sums.add_act((layer, rows.expert), taylor_statistics(act[None], act[None], backend=backend).act)
    output = experts.output(rows.expert, act)
    routing.add(rows, weights, output)
    return output


def gradient_scale(scaled: bool, seq_len: int, attempt: int) -> float:
    """Return the power of two by which a micro-batch's gradients are multiplied."""
    if not scaled:
        return 1.0
    # 64 to 128 in each row of the loss, whatever the length; a sixteenth at each new attempt.
    return float(2.0 ** (6 + math.ceil(math.log2(seq_len)) - 4 * attempt))
