"""The autograd graph of one layer, whose backward makes the statistics of its MLP and experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from hfprune_fast.engine.expert_hooks import scored_experts
from hfprune_fast.engine.mlp_hooks import Target, TaylorOptions, scored_mlp
from hfprune_fast.engine.routing import Routing
from hfprune_fast.kernels import TaylorStatistics
from hfprune_fast.models.experts import ExpertsMLP
from hfprune_fast.models.sites import GatedMLP


class ScoredGraph:
    """The autograd graph of one layer for one micro-batch, from the layer's input to its output.

    Args:
        run: the layer; inside, it runs `mlp` and `experts`, whose statistics are made as `options`
            say.
        hidden: the layer's input.
        needs_grad: whether the backward must give the input a gradient; not so in the first layer.
        only_backward: the values of the MLP's output are not needed, so a known MLP skips the
            product with W_down and returns NaN, so that any use of the values shows.

    `routing` is what the forward says of the experts, None without any.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        hidden: Tensor,
        mlp: GatedMLP | None,
        options: TaylorOptions,
        *,
        experts: ExpertsMLP | None = None,
        needs_grad: bool,
        only_backward: bool = False,
    ) -> None:
        # The autograd graph refers to the target and not to self, which refers to the graph: a
        # cycle through autograd's nodes is never freed.
        self._target = Target()
        self._input = hidden.detach().requires_grad_(needs_grad)
        self._overwritten = False
        with ExitStack() as stack:
            if mlp is not None:
                scored = scored_mlp(mlp, self._target, options, needs_grad, only_backward)
                stack.enter_context(scored)
            if experts is not None:
                stack.enter_context(scored_experts(experts, self._target, options))
            stack.enter_context(torch.enable_grad())
            self.output = run(self._input)
        self.routing: Routing | None = self._target.routing

    def backward(
        self,
        d_output: Tensor,
        take: Callable[[TaylorStatistics], object],
        *,
        take_gradient: Callable[[Tensor], object] | None = None,
        take_expert: Callable[[int, TaylorStatistics, Tensor], object] = lambda *_: None,
        take_experts_gradient: Callable[[Tensor], object] | None = None,
        last: bool = True,
    ) -> Tensor | None:
        """Run one backward; return the gradient at the input, None if it needs none.

        Args:
            d_output: the gradient at the output.
            take: is given the statistics that this backward makes of the layer's own MLP.
            take_gradient: is given the gradient at the output of its down_proj, (B, T, D).
            take_expert: is given an expert's number, its statistics and its Taylor term.
            take_experts_gradient: is given the gradient at the output of the experts, (B·T, D).
            last: no other backward follows, so what the graph holds may be overwritten.
        """
        if self._overwritten:
            raise RuntimeError("the graph's last backward has been run; run the forward again")
        self._overwritten = last
        target = self._target
        target.take, target.take_gradient, target.last = take, take_gradient, last
        target.take_expert, target.take_experts_gradient = take_expert, take_experts_gradient
        self.output.backward(d_output, retain_graph=not last)
        d_input, self._input.grad = self._input.grad, None
        return d_input
