"""Everything that intercepts an MLP: statistics, acts, and a pruned model's down_proj.

`ScoredGraph` runs a layer with an autograd graph whose backward makes the statistics of the layer's
MLP. The MLP's forward is the model's own, out = down(act_fn(gate(x)) * up(x)), of which only gate
and up are kept. Backward, given d_out, with a = act_fn(gate) * up:

    g = d_out · W_down                                      dloss/da
    statistics, d_gate, d_up = gated_taylor(g, gate, up)    may overwrite gate and up
    d_x = d_gate · W_gate + d_up · W_up

No weight gets a gradient. Where x needs none either, as in the first layer, a is kept instead and
only the statistics are made. An MLP that does not compute exactly this, bit by bit, keeps its
forward and is hooked at the input of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.kernels import TaylorStatistics, gated_taylor, taylor_statistics
from hfprune_fast.models.sites import GatedMLP

# As transformers computes them.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
_PROBES = (1.0, 30.0, 1000.0)  # sizes of the inputs by which an MLP's formula is compared


@dataclass(frozen=True)
class TaylorOptions:
    """How the statistics of a micro-batch are made."""

    token_mask: Tensor | None
    grad_scale: float
    parity: bool
    backend: str
    activation: str | None = None  # of `known_activation`; without it the MLP is hooked

    @property
    def common(self) -> dict[str, Any]:
        """The options that both kernels take."""
        names = ("token_mask", "grad_scale", "backend")
        return {name: getattr(self, name) for name in names}


class ScoredGraph:
    """The autograd graph of one layer for one micro-batch, from the layer's input to its output.

    Args:
        run: the layer; inside, it runs `mlp`, whose statistics are made as `options` say.
        hidden: the layer's input.
        needs_grad: whether the backward must give the input a gradient; not so in the first layer.
        only_backward: the values of the MLP's output are not needed, so a known MLP skips the
            product with W_down and returns NaN, so that any use of the values shows.
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
        self,
        d_output: Tensor,
        take: Callable[[TaylorStatistics], object],
        *,
        take_gradient: Callable[[Tensor], object] | None = None,
        last: bool = True,
    ) -> Tensor | None:
        """Run one backward; return the gradient at the input, None if it needs none.

        Args:
            d_output: the gradient at the output.
            take: is given the statistics that this backward makes.
            take_gradient: is given the gradient at the output of down_proj, (B, T, D).
            last: no other backward follows, so what the graph holds may be overwritten.
        """
        if self._overwritten:
            raise RuntimeError("the graph's last backward has been run; run the forward again")
        self._overwritten = last
        self._target.take, self._target.last = take, last
        self._target.take_gradient = take_gradient
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
def outputs_of(mlp: GatedMLP) -> Iterator[list[Tensor]]:
    """Collect the outputs of down_proj."""
    seen: list[Tensor] = []
    with mlp.down.register_forward_hook(lambda *args: seen.append(args[2])):
        yield seen


@contextmanager
def pruned_down_proj(mlp: GatedMLP, kept: Tensor, weight: Tensor) -> Iterator[None]:
    """Inside, down_proj reads only the `kept` neurons, with `weight` (D, K) instead of its own."""

    def instead(down: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return nn.functional.linear(args[0][..., kept], weight, mlp.down.bias)

    with mlp.down.register_forward_hook(instead):
        yield


@torch.no_grad()
def known_activation(mlp: GatedMLP) -> str | None:
    """Return the activation's name in our kernels, or None for an MLP that must be hooked.

    Its module's output is compared, bit by bit, with down(act_fn(gate(x)) * up(x)) for a few
    invented x, with the layers' weights in place. Modules with hooks, or with a forward set on the
    instance, are not asked: what they do beside must happen each time. The linear layers are plain
    (`models.plain.plain_model`).
    """
    changed = any(
        "forward" in vars(m)
        or m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        for m in mlp.module.modules()
    )
    weight = mlp.down.weight
    if changed or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 1, weight.shape[0], generator=generator)
    x = torch.cat([row * size for size in _PROBES], dim=1).to(weight.device, weight.dtype)
    output = mlp.module(x)
    gate, up = _gate_and_up(mlp, x)
    for name, act_fn in _ACTIVATIONS.items():
        if torch.equal(mlp.down(act_fn(gate) * up), output):
            return name
    return None


def _gate_and_up(mlp: GatedMLP, x: Tensor) -> tuple[Tensor, ...]:
    """Return gate(x) and up(x): two tensors, or the halves of one."""
    if mlp.fused:
        halves: tuple[Tensor, ...] = mlp.gate(x).chunk(2, dim=-1)
        return halves
    return mlp.gate(x), mlp.up(x)


class _Target:
    """Where the backward that runs delivers its results, and whether it is the graph's last."""

    take: Callable[[TaylorStatistics], object]
    take_gradient: Callable[[Tensor], object] | None
    last: bool


@contextmanager
def _scored(
    mlp: GatedMLP, target: _Target, options: TaylorOptions, needs_grad: bool, only_backward: bool
) -> Iterator[None]:
    """Inside, the MLP's forward is one whose backward makes the statistics."""
    if options.activation is None or options.parity:
        with (
            mlp.down.register_forward_pre_hook(_at_down_proj(target, options, needs_grad)),
            mlp.down.register_forward_hook(_behind_down_proj(target)),
        ):
            yield
        return
    anchor = torch.empty(0, requires_grad=True)  # so that there always is a backward

    def forward(x: Tensor) -> Tensor:
        output: Tensor = _ScoredMLP.apply(  # type: ignore[no-untyped-call]
            x, anchor, mlp, target, options, only_backward
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


def _behind_down_proj(target: _Target) -> Callable[..., None]:
    def at_gradient(grad: Tensor) -> None:
        if target.take_gradient is not None:
            target.take_gradient(grad)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(at_gradient)

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
        only_backward: bool,
    ) -> Tensor:
        gate, up = _gate_and_up(mlp, x)
        ctx.mlp, ctx.target, ctx.options = mlp, target, options
        first = not ctx.needs_input_grad[0]
        if first or not only_backward:
            assert options.activation is not None
            act = _ACTIVATIONS[options.activation](gate) * up
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
        options: TaylorOptions = ctx.options
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        if target.take_gradient is not None:
            target.take_gradient(d_out)
        rows = d_out.flatten(0, 1)
        grad = (rows @ mlp.down.weight).view(*d_out.shape[:2], -1)
        if len(saved) == 1:
            target.take(taylor_statistics(grad, saved[0], **options.common))
            return (None,) * 6
        assert options.activation is not None
        statistics, d_gate, d_up = gated_taylor(
            grad, *saved, activation=options.activation, overwrite=target.last, **options.common
        )
        del grad
        target.take(statistics)
        gate_weight, up_weight = mlp.gate_and_up_weights
        d_x = d_gate.flatten(0, 1) @ gate_weight
        torch.addmm(d_x, d_up.flatten(0, 1), up_weight, out=d_x)
        return d_x.view_as(d_out), None, None, None, None, None
