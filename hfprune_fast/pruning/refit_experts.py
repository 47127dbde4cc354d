"""Refit a layer with experts to the dense model: each expert's down_proj, and the shared expert's.

The pruned model's routing chooses among the experts that stay. Let r be what is missing after its
layer if no MLP were narrowed: the dense model's residual stream there, less the pruned model's, so
the error of the layers before and the outputs of dropped experts. The MLPs that a token goes
through, each with what its output is multiplied by (w of an expert, s of the shared one, 1 or a
sigmoid), share r in the smallest way that adds up to it:

    target_e = y_e + r · w_e / (Σ w² + s²)                 y_e of all neurons of the dense expert

and V_e minimises mean w²‖target_e - V_e a_e‖² + λ Σ_j mean(w² a_ej²)·‖v_ej - w_ej‖² over the tokens
that chose it, a_e the acts of its kept neurons. An expert that fewer than 8 tokens a kept neuron
chose keeps its weights. Where norms follow the experts, r is left out: each is fitted to its own
output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.expert_hooks import Visit, visited_experts
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.mlp_hooks import in_sequences, inputs_of, outputs_of, pruned_down_proj
from hfprune_fast.engine.routing import Rows
from hfprune_fast.models.sites import SiteKey
from hfprune_fast.pruning.normal_equations import NormalEquations
from hfprune_fast.scoring.costs import TOKENS_A_NEURON
from hfprune_fast.scoring.moments import moments_dtype


class PrunedExperts:
    """A layer with experts of a pruned model: the dense model's, but for what is not kept."""

    def __init__(
        self,
        model: ResidentModel,
        layer: int,
        keep: Mapping[SiteKey, Tensor],
    ) -> None:
        self._model, self._layer = model, layer
        self._mlp, experts = model.parts.mlps[layer], model.parts.experts[layer]
        assert experts is not None
        self._experts, self._dtype = experts, moments_dtype(model)
        self._stay = [e for e in range(experts.count) if (layer, e) in keep]
        self._kept: dict[SiteKey, Tensor] = {}
        self._equations: dict[SiteKey, NormalEquations] = {}
        for e in self._stay:
            self._open((layer, e), experts.down(e), keep)
        if self._mlp is not None:
            self._open(layer, self._mlp.down.weight.detach(), keep)
        self._weights: dict[SiteKey, Tensor] = {}
        self._with_error = not model.parts.family.norm_behind
        self.unfitted = 0  # experts

    def _open(self, site: SiteKey, down: Tensor, keep: Mapping[SiteKey, Tensor]) -> None:
        self._kept[site] = keep[site].to(down.device)
        self._equations[site] = NormalEquations(down[:, self._kept[site]])

    def add(
        self,
        i: int,
        dense: Tensor,
        output: Tensor | None,
        stream: Tensor,
        batch: MicroBatch,
        held_out: int,
    ) -> Tensor:
        """Add a batch to the least squares, and return what `finish` takes: the stream as it is.

        Args:
            i: the batch's number.
            dense: the dense model's residual stream after the layer.
            output: not used here; a norm behind a layer's own MLP needs it.
            stream: the pruned model's residual stream before the layer.
            held_out: not used here: few tokens choose an expert, so that the ridge is fixed.
        """
        rows_seen: list[tuple[Rows, Tensor, Tensor, Tensor]] = []

        def visit(rows: Rows, x: Tensor, weights: Tensor) -> Tensor:
            act = self._experts.act(self._experts.gate_up(rows.expert, x))
            output = self._experts.output(rows.expert, act)
            rows_seen.append((rows, act, output, weights))
            return output

        sequences, hidden = len(batch.ids), dense.shape[-1]
        with ExitStack() as stack:
            stack.enter_context(self._visited(batch, visit))
            acts, outputs, gates = self._own_seen(stack)
            after = self._model.run(self._layer, stream.to(self._model.device), batch)
        own = self._own_factor(gates, batch)  # 0 at padding
        total = own.square()
        for rows, _, _, weights in rows_seen:
            total[rows.tokens] += weights.to(total.dtype).square()
        missing = (dense.to(after.device).to(self._dtype) - after.to(self._dtype)).view(-1, hidden)
        share = missing / self._model.parts.output_scale(self._layer)
        counts = (total > 0) & self._with_error
        share = torch.where(counts[:, None], share / total[:, None], 0)
        for rows, act, output, weights in rows_seen:
            w = weights.to(self._dtype)
            target = output.to(self._dtype) + share[rows.tokens] * w[:, None]
            bias = self._experts.down_bias(rows.expert)
            target = target if bias is None else target - bias
            self._add((self._layer, rows.expert), act, target, w)
        if self._mlp is not None:
            act, output = (in_sequences(t[0], sequences).flatten(0, 1) for t in (acts, outputs))
            target = output.to(self._dtype) + share * own[:, None]
            bias = self._mlp.down.bias
            target = target if bias is None else target - bias
            seen = own > 0  # not padding
            self._add(self._layer, act[seen], target[seen], own[seen])
        return stream

    def _add(self, site: SiteKey, act: Tensor, target: Tensor, weights: Tensor) -> None:
        """Add rows of act (n, F), and of what down_proj shall return, (n, D), weighed (n,)."""
        counts = weights.square()[:, None]
        self._equations[site].add(act[:, self._kept[site]], target, counts)

    def solve(self) -> dict[SiteKey, Tensor]:
        """Return the refitted (D, K) weights in the model's dtype, without those of few rows."""
        fitted: dict[SiteKey, Tensor] = {}
        for site, equations in self._equations.items():
            few = equations.tokens < TOKENS_A_NEURON * len(self._kept[site])
            if few and not isinstance(site, int):
                self.unfitted += 1
                self._weights[site] = equations.weight
                continue
            weight = equations.solve(self._layer)
            self._weights[site] = fitted[site] = weight.to(self._model.dtype)
        return fitted

    def finish(self, i: int, stream: Tensor, batch: MicroBatch) -> Tensor:
        """Return the pruned stream after the layer, with the refitted weights."""

        def visit(rows: Rows, x: Tensor, weights: Tensor) -> Tensor:
            site = self._layer, rows.expert
            act = self._experts.act(self._experts.gate_up(rows.expert, x))
            kept = act[:, self._kept[site]]
            bias = self._experts.down_bias(rows.expert)
            return torch.nn.functional.linear(kept, self._weights[site], bias)

        with ExitStack() as stack:
            stack.enter_context(self._visited(batch, visit))
            if self._mlp is not None:
                own = self._kept[self._layer], self._weights[self._layer]
                stack.enter_context(pruned_down_proj(self._mlp, *own))
            return self._model.run(self._layer, stream.to(self._model.device), batch)

    @contextmanager
    def _visited(self, batch: MicroBatch, visit: Visit) -> Iterator[None]:
        mask = batch.token_mask
        on_device = None if mask is None else mask.to(self._model.device)
        with visited_experts(self._experts, visit, on_device, len(batch.ids), self._stay):
            yield

    def _own_seen(self, stack: ExitStack) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Collect inputs and outputs of the layer's own down_proj, and outputs of its gate."""
        gates: list[Tensor] = []
        if self._mlp is None:
            return [], [], gates
        path = self._experts.described.shared_gate
        if path:
            gates = stack.enter_context(outputs_of(self._experts.layer.get_submodule(path)))
        acts = stack.enter_context(inputs_of(self._mlp.down))
        return acts, stack.enter_context(outputs_of(self._mlp.down)), gates

    def _own_factor(self, gates: list[Tensor], batch: MicroBatch) -> Tensor:
        """Return what the own MLP's output is multiplied by at each token, (B·T,); 0 at padding."""
        tokens, mask = batch.ids.numel(), batch.token_mask
        factor = torch.full((tokens,), float(self._mlp is not None), dtype=self._dtype)
        factor = factor.to(self._model.device)
        for gate in gates:
            factor = gate.flatten().to(self._dtype).sigmoid()
        return factor if mask is None else factor * mask.flatten().to(factor)
