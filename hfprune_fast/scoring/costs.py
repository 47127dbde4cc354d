"""Run the dense model layer by layer and compute what removing each MLP's neurons would cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine.expert_hooks import visited_experts
from hfprune_fast.engine.layerwise import (
    OnProgress,
    ResidentModel,
    each_batch,
    for_each_layer,
    no_progress,
)
from hfprune_fast.engine.mlp_hooks import in_sequences, inputs_of
from hfprune_fast.engine.routing import Rows
from hfprune_fast.models.sites import ModelParts, SiteKey, site_slices, table_shape
from hfprune_fast.scoring.moments import (
    add_gram,
    check_moments,
    covariance_outputs,
    mirror,
    moments_dtype,
    token_rows,
)
from hfprune_fast.scoring.obs import greedy_removal_costs

# With fewer routed tokens for each neuron, second moments say more of the text than of the expert.
TOKENS_A_NEURON = 8


@torch.no_grad()
def removal_costs(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    output_fisher: Tensor | None = None,
    on_progress: OnProgress = no_progress,
) -> Tensor:
    """Return what each neuron's removal costs when the others are refitted, float64.

    It is a table, (L, F), or (N,) with experts. An expert that fewer than TOKENS_A_NEURON tokens a
    neuron chose has costs 0; `ExpertBudget.keep` ranks its neurons by another statistic.

    Args:
        model: the entered model.
        batches: the calibration.
        output_fisher: (G, D, D) C of each layer's own MLP and of its experts, a mean over tokens;
            None is the identity, whose costs are not comparable between layers.
        on_progress: called with the tokens processed, a layer at a time.

    Raises:
        NumericsError: the activations of a layer hold NaN or inf.
    """
    tokens = sum(batch.tokens for batch in batches)
    hidden = [model.kept(model.begin(batch)) for batch in batches]
    parts = model.parts
    slices, costs = site_slices(parts.widths), torch.zeros(table_shape(parts.widths)).double()
    metrics: dict[tuple[int, bool], Tensor] = {}
    if output_fisher is not None:
        metrics = dict(zip(covariance_outputs(parts), output_fisher, strict=True))

    def visit(layer: int) -> None:
        grams = _Grams(model, layer)
        for i, batch in each_batch(batches, on_progress, len(parts.layers)):
            with grams.added(batch):
                hidden[i] = model.kept(model.run(layer, hidden[i].to(model.device), batch))
        own = {
            of_experts: metrics[layer, of_experts].to(model.device)
            for of_experts in (False, True)
            if (layer, of_experts) in metrics
        }
        for site, gram in grams.total().items():
            check_moments(gram, layer)
            metric = own.get(not isinstance(site, int))
            costs.view(-1)[slices[site]] = greedy_removal_costs(
                gram.div_(tokens), grams.down(site), metric
            )

    for_each_layer(model, visit, then=0)
    return costs


def own_outputs(parts: ModelParts, output_fisher: Tensor) -> dict[int, Tensor]:
    """Return {layer: (D, D)} of layers' own MLPs, of what `removal_costs` takes."""
    outputs = zip(covariance_outputs(parts), output_fisher, strict=True)
    return {layer: metric for (layer, of_experts), metric in outputs if not of_experts}


class _Grams:
    """Second moments of the acts of a layer's MLPs: Σ a aᵀ, of an expert with weights w²."""

    def __init__(self, model: ResidentModel, layer: int) -> None:
        self._model, self._layer = model, layer
        self._mlp, self._experts = model.parts.mlps[layer], model.parts.experts[layer]
        self._dtype = moments_dtype(model)
        self._sums: dict[SiteKey, Tensor] = {}
        self._rows: Counter[SiteKey] = Counter()

    def total(self) -> dict[SiteKey, Tensor]:
        """Return the moments, without those of experts with few rows."""
        return {
            site: mirror(gram)
            for site, gram in self._sums.items()
            if isinstance(site, int) or self._rows[site] >= TOKENS_A_NEURON * len(gram)
        }

    def down(self, site: SiteKey) -> Tensor:
        """Return the down projection (D, F) of a site."""
        if isinstance(site, int):
            assert self._mlp is not None
            return self._mlp.down.weight
        assert self._experts is not None
        return self._experts.down(site[1])

    @contextmanager
    def added(self, batch: MicroBatch) -> Iterator[None]:
        """Inside, the layer runs on a batch, whose acts are added."""
        sequences, mask = len(batch.ids), batch.token_mask
        on_device = None if mask is None else mask.to(self._model.device)
        acts: list[Tensor] = []
        with ExitStack() as hooks:
            if self._mlp is not None:
                acts = hooks.enter_context(inputs_of(self._mlp.down))
            if self._experts is not None:
                visited = visited_experts(self._experts, self._visit, on_device, sequences)
                hooks.enter_context(visited)
            yield
        for act in acts:
            self._add(self._layer, token_rows(in_sequences(act, sequences), batch))

    def _visit(self, rows: Rows, x: Tensor, weights: Tensor) -> Tensor:
        assert self._experts is not None
        act = self._experts.act(self._experts.gate_up(rows.expert, x))
        self._add((self._layer, rows.expert), act, weights)
        return self._experts.output(rows.expert, act)

    def _add(self, site: SiteKey, act: Tensor, weights: Tensor | None = None) -> None:
        rows = act if weights is None else act.to(self._dtype) * weights[:, None].to(self._dtype)
        if site not in self._sums:
            width = rows.shape[1]
            self._sums[site] = rows.new_zeros(width, width, dtype=torch.float64)
        add_gram(self._sums[site], rows)
        self._rows[site] += len(rows)
