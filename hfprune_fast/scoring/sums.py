"""The sums of a run: what is summed, and a pass's own, by layer and expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.routing import Routing
from hfprune_fast.kernels import TaylorStatistics
from hfprune_fast.models.sites import ModelParts, SiteKey, site_slices, table_shape
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.moments import OutputCovariance, column_norms, covariance_outputs

_ACT = TaylorStatistics._fields.index("act")
_TAYLOR = 3  # rows of `ScoreAccumulator.experts` before the criteria's


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
    parts, device = model.parts, model.device
    shape, hidden = table_shape(parts.widths), parts.head.weight.shape[1]
    criteria = max(1, len(options.criteria)), len(TaylorStatistics._fields)
    dtype = model.dtype if options.parity else torch.float64
    wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
    experts = sum(each.count for each in parts.with_experts.values())
    covariances = None
    if options.output_fisher:
        covariances = torch.zeros(
            len(covariance_outputs(parts)), hidden, hidden, dtype=torch.float32,
            device=device if model.streams_on_device else "cpu",
        )  # fmt: skip
    return ScoreAccumulator(
        torch.zeros(*criteria, *shape, dtype=dtype, device=device),
        torch.zeros(shape, **wide),
        covariances,
        torch.zeros(_TAYLOR + len(options.criteria), experts, **wide) if experts else None,
        loss_nats=(0.0,) * len(options.criteria),
    )


class PassSums:
    """The sums of `total` with those of a pass added to them; `total` stays what it is.

    Args:
        spare: sums of no further use, in whose place the new ones are made; None makes room. A part
            is copied from `total` where it is first added to.
    """

    def __init__(
        self, total: ScoreAccumulator, parts: ModelParts, spare: ScoreAccumulator | None = None
    ) -> None:
        self._parts, self._before = parts, total
        room: dict[str, Any] = {
            name: torch.zeros_like(tensor) if spare is None else getattr(spare, name)
            for name in ("statistics", "output_fisher")
            for tensor in [getattr(total, name)]
            if tensor is not None
        }
        room["down_norm"] = total.down_norm.clone()
        room["experts"] = None if total.experts is None else total.experts.clone()
        self._total = replace(total, **room)
        self._begun = set[tuple[Any, ...]]()  # parts that are copied
        # Views whose last axis is that of `site_slices`.
        self._statistics = self._total.statistics.flatten(2)
        self._statistics_before = total.statistics.flatten(2)
        self._down_norm = self._total.down_norm.flatten()
        self._output_fisher, self._experts = self._total.output_fisher, self._total.experts
        self._slices = site_slices(parts.widths)
        self._first: dict[int, int] = {}  # of each layer's experts, among those of all
        self._outputs = {output: i for i, output in enumerate(covariance_outputs(parts))}
        begin = 0
        for layer, experts in parts.with_experts.items():
            self._first[layer], begin = begin, begin + experts.count

    def result(self, loss_nats: tuple[float, ...] = ()) -> ScoreAccumulator:
        """Return the new sums; those of parts that nothing was added to are the old ones."""
        for criterion in range(len(self._statistics)):
            for site in self._slices:
                self._of_site(criterion, site)
        if self._output_fisher is not None:
            for output in self._outputs.values():
                self._of_output(output)
        return replace(self._total, loss_nats=loss_nats)

    def _of_site(self, criterion: int, site: SiteKey) -> Tensor:
        """Return the sums of an MLP or expert, (4, width), to add to."""
        part = criterion, slice(None), self._slices[site]
        if (criterion, site) not in self._begun:
            self._begun.add((criterion, site))
            self._statistics[part].copy_(self._statistics_before[part])
        return self._statistics[part]

    def _of_output(self, output: int) -> Tensor:
        """Return the sums (D, D) of an output's gradients, to add to."""
        assert self._output_fisher is not None
        assert self._before.output_fisher is not None
        if (output,) not in self._begun:
            self._begun.add((output,))
            self._output_fisher[output].copy_(self._before.output_fisher[output])
        return self._output_fisher[output]

    def add_norms(self, layer: int) -> None:
        """Note the norms of a layer's down_proj, whose weights are in place."""
        mlp, experts = self._parts.mlps[layer], self._parts.experts[layer]
        if mlp is not None:
            self._down_norm[self._slices[layer]] = column_norms(mlp.down.weight)
        for e in range(0 if experts is None else experts.count):
            assert experts is not None
            self._down_norm[self._slices[layer, e]] = column_norms(experts.down(e))

    def add(self, site: SiteKey, criterion: int, statistics: TaylorStatistics) -> None:
        """Add the statistics of one MLP or expert."""
        self._of_site(criterion, site).add_(torch.stack(statistics))

    def add_act(self, site: SiteKey, act: Tensor) -> None:
        """Add Σa² alone."""
        self._of_site(0, site)[_ACT].add_(act)

    def add_taylor(self, layer: int, expert: int, criterion: int, taylor: Tensor) -> None:
        """Add the Taylor term of an expert."""
        assert self._experts is not None
        self._experts[_TAYLOR + criterion, self._first[layer] + expert] += taylor

    def add_routing(self, layer: int, routing: Routing | None) -> None:
        """Add what a forward says of a layer's experts."""
        if routing is None or self._experts is None:
            return
        first = self._first[layer]
        rows = (routing.output_norms, routing.tokens, routing.weights)
        for row, numbers in zip(self._experts, rows, strict=False):
            row[first : first + len(numbers)] += numbers

    def covariances(self, layer: int, dtype: torch.dtype) -> dict[bool, OutputCovariance]:
        """Return empty covariances of a layer's outputs, by whether they are of its experts."""
        if self._output_fisher is None:
            return {}
        of_each = self._output_fisher.shape[-1], dtype, self._statistics.device
        return {of: OutputCovariance(*of_each) for at, of in self._outputs if at == layer}

    def add_covariances(self, layer: int, covariances: dict[bool, OutputCovariance]) -> None:
        for of_experts, covariance in covariances.items():
            output = self._outputs[layer, of_experts]
            sums = self._of_output(output)
            sums.add_(covariance.total().to(sums.device))
