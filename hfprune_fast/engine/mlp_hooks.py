"""Everything that intercepts an MLP: statistics, acts, and a pruned model's down_proj.

`ScoredGraph` runs a layer with an autograd graph whose backward makes the statistics of the layer's
MLP. The MLP's forward is the model's own, out = down(act_fn(gate(x)) * up(x)), of which only gate
and up are kept. Backward, given d_out, with a = act_fn(gate) * up:

    g = d_out · W_down                                      dloss/da
    statistics, d_gate, d_up = gated_taylor(g, gate, up)    may overwrite gate and up
    d_x = d_gate · W_gate + d_up · W_up

No weight gets a gradient. Where x needs none either, as in the first layer, a is kept instead and
only the statistics are made. An MLP that is not known to compute exactly this keeps its forward
and is hooked at the input of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.kernels import TaylorStatistics, gated_taylor, taylor_statistics
from hfprune_fast.models.sites import GatedMLP

_ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
}


@dataclass(frozen=True)
class TaylorOptions:
    """How the statistics of a micro-batch are made."""

    token_mask: Tensor | None
    grad_scale: float
    parity: bool
    backend: str

    @property
    def common(self) -> dict[str, Any]:
        """The options that both kernels take."""
        return {name: value for name, value in vars(self).items() if name != "parity"}


class ScoredGraph:
    """The autograd graph of one layer for one micro-batch, from the layer's input to its output.

    Args:
        run: the layer; inside, it runs `mlp`, whose statistics are made as `options` say.
        hidden: the layer's input.
        needs_grad: whether the backward must give the input a gradient; not so in the first layer.
        only_backward: the output's values are not needed, so a known MLP skips the product with
            W_down and returns NaN, so that any use of the values shows.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        hidden: Tensor,
        mlp: GatedMLP,
        options: TaylorOptions,
        *,
        needs_grad: bool,
        only_backward: bool = False,
    ) -> None:
        # The autograd graph refers to the target and not to self, which refers to the graph: a
        # cycle through autograd's nodes is never freed.
        self._target = _Target()
        self._input = hidden.detach().requires_grad_(needs_grad)
        self._overwritten = False
        scored = _scored(mlp, self._target, options, needs_grad, only_backward)
        with torch.enable_grad(), scored:
            self.output = run(self._input)

    def backward(
        self, d_output: Tensor, take: Callable[[TaylorStatistics], object], *, last: bool = True
    ) -> Tensor | None:
        """Run one backward; return the gradient at the input, None if it needs none.

        Args:
            d_output: the gradient at the output.
            take: is given the statistics that this backward makes.
            last: no other backward follows, so what the graph holds may be overwritten.
        """
        if self._overwritten:
            raise RuntimeError("the graph's last backward has been run; run the forward again")
        self._overwritten = last
        self._target.take, self._target.last = take, last
        self.output.backward(d_output, retain_graph=not last)
        d_input, self._input.grad = self._input.grad, None
        return d_input


@contextmanager
def acts_of(mlp: GatedMLP, silent: bool = False) -> Iterator[list[Tensor]]:
    """Collect the inputs of down_proj; a silent MLP's output is 0."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        note = mlp.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        hooks.enter_context(note)
        if silent:
            zero = mlp.module.register_forward_hook(lambda *args: torch.zeros_like(args[2]))
            hooks.enter_context(zero)
        yield seen


@contextmanager
def pruned_down_proj(mlp: GatedMLP, kept: Tensor, weight: Tensor) -> Iterator[None]:
    """Inside, down_proj reads only the `kept` neurons, with `weight` (D, K) instead of its own."""

    def instead(down: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return nn.functional.linear(args[0][..., kept], weight, mlp.down.bias)

    with mlp.down.register_forward_hook(instead):
        yield


def known_activation(mlp: GatedMLP) -> str | None:
    """Return the activation's name in our kernels, or None for an MLP that must be hooked.

    Known are transformers' MLP classes, unmodified: no hooks, and no forward set on an instance,
    the activation included. The linear layers are plain (`models.sites.plain_model`).
    """
    linears = (mlp.gate, mlp.up, mlp.down)
    act_fn = getattr(mlp.module, "act_fn", None)
    changed = any(
        "forward" in vars(m)
        or m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        for m in (mlp.module, act_fn, *linears)
        if isinstance(m, nn.Module)
    )
    if changed or not type(mlp.module).__module__.startswith("transformers.models."):
        return None
    return _ACTIVATIONS.get(f"{type(act_fn).__module__}.{type(act_fn).__name__}")


class _Target:
    """Where the backward that runs delivers its statistics, and whether it is the graph's last."""

    take: Callable[[TaylorStatistics], object]
    last: bool


@contextmanager
def _scored(
    mlp: GatedMLP, target: _Target, options: TaylorOptions, needs_grad: bool, only_backward: bool
) -> Iterator[None]:
    """Inside, the MLP's forward is one whose backward makes the statistics."""
    activation = None if options.parity else known_activation(mlp)
    if activation is None:
        with mlp.down.register_forward_pre_hook(_at_down_proj(target, options, needs_grad)):
            yield
        return
    anchor = torch.empty(0, requires_grad=True)  # so that there always is a backward

    def forward(x: Tensor) -> Tensor:
        output: Tensor = _ScoredMLP.apply(  # type: ignore[no-untyped-call]
            x, anchor, mlp, target, options, activation, only_backward
        )
        return output

    mlp.module.forward = forward
    try:
        yield
    finally:
        del mlp.module.forward


def _at_down_proj(
    target: _Target, options: TaylorOptions, needs_grad: bool
) -> Callable[..., tuple[Tensor, ...]]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        act = args[0] if needs_grad else args[0].detach().requires_grad_()
        detached = act.detach()

        def at_gradient(grad: Tensor) -> None:
            target.take(taylor_statistics(grad, detached, parity=options.parity, **options.common))

        act.register_hook(at_gradient)
        return (act, *args[1:])

    return hook


class _ScoredMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        mlp: GatedMLP,
        target: _Target,
        options: TaylorOptions,
        activation: str,
        only_backward: bool,
    ) -> Tensor:
        gate, up = mlp.gate(x), mlp.up(x)
        ctx.mlp, ctx.target, ctx.options, ctx.activation = mlp, target, options, activation
        first = not ctx.needs_input_grad[0]
        if first or not only_backward:
            act_fn: Any = mlp.module.act_fn
            act = act_fn(gate) * up
        ctx.save_for_backward(*((act,) if first else (gate, up)))
        if only_backward:
            return x.new_full((), torch.nan).expand_as(x)
        output: Tensor = mlp.down(act)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        mlp: GatedMLP = ctx.mlp
        target: _Target = ctx.target
        options: dict[str, Any] = ctx.options.common
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        rows = d_out.flatten(0, 1)
        grad = (rows @ mlp.down.weight).view(*d_out.shape[:2], -1)
        if len(saved) == 1:
            target.take(taylor_statistics(grad, saved[0], **options))
            return (None,) * 7
        statistics, d_gate, d_up = gated_taylor(
            grad, *saved, activation=ctx.activation, overwrite=target.last, **options
        )
        del grad
        target.take(statistics)
        d_x = d_gate.flatten(0, 1) @ mlp.gate.weight
        torch.addmm(d_x, d_up.flatten(0, 1), mlp.up.weight, out=d_x)
        return d_x.view_as(d_out), None, None, None, None, None, None
