"""Everything that intercepts an MLP: statistics, acts, and a pruned model's down_proj.

Inside `scored_mlp` a layer runs with a graph whose backward makes the statistics of its MLP. The
MLP's forward is the model's own, out = down(act_fn(gate(x)) * up(x)), of which only gate and up are
kept. Backward, given d_out, with a = act_fn(gate) * up:

    g = d_out · W_down                                      dloss/da
    statistics, d_gate, d_up = gated_taylor(g, gate, up)    may overwrite gate and up
    d_x = d_gate · W_gate + d_up · W_up

No weight gets a gradient. Where x needs none either, as in the first layer, a is kept instead and
only the statistics are made. An MLP that does not compute exactly this, bit by bit, keeps its
forward and is hooked at the input of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.engine.routing import Routing
from hfprune_fast.kernels import TaylorStatistics, gated_taylor, taylor_statistics
from hfprune_fast.models.plain import is_patched
from hfprune_fast.models.sites import GatedMLP

# As transformers computes them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
PROBE_SIZES = (1.0, 30.0, 1000.0)  # of the inputs by which an MLP's formula is compared


@dataclass(frozen=True)
class TaylorOptions:
    """How the statistics of a micro-batch are made."""

    token_mask: Tensor | None
    grad_scale: float
    parity: bool
    backend: str
    activation: str | None = None  # of `known_activation`; without it the MLP is hooked
    experts_activation: str | None = None  # of `expert_hooks.known_gate`
    sequences: int = 1

    @property
    def common(self) -> dict[str, Any]:
        """The options that both kernels take."""
        names = ("token_mask", "grad_scale", "backend")
        return {name: getattr(self, name) for name in names}


@dataclass
class Target:
    """Where the backward that runs delivers its results, and whether it is the graph's last."""

    # Are given what is made of the layer's own MLP: its statistics, and the gradient at the output
    # of down_proj, (B, T, D).
    take: Callable[[TaylorStatistics], object] = lambda _: None
    take_gradient: Callable[[Tensor], object] | None = None
    # Of an expert: its number, statistics and Taylor term; of all: the gradient at their output,
    # (T, D), and by the forward what the routing says.
    take_expert: Callable[[int, TaylorStatistics, Tensor], object] = lambda *_: None
    take_experts_gradient: Callable[[Tensor], object] | None = None
    routing: Routing | None = None
    last: bool = True


def in_sequences(tensor: Tensor, sequences: int) -> Tensor:
    """Return (B, T, n) of a tensor in which tokens may have one axis: shared experts get that."""
    return tensor if tensor.dim() == 3 else tensor.reshape(sequences, -1, tensor.shape[-1])


@contextmanager
def silent_mlp(mlp: GatedMLP) -> Iterator[list[Tensor]]:
    """Collect the inputs of down_proj, which does not run: the MLP's output is 0."""
    seen: list[Tensor] = []

    def forward(act: Tensor) -> Tensor:
        seen.append(act)
        return act.new_zeros(*act.shape[:-1], len(mlp.down.weight))

    mlp.down.forward = forward  # type: ignore[assignment]
    try:
        yield seen
    finally:
        del mlp.down.forward


@contextmanager
def outputs_of(linear: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a linear layer."""
    seen: list[Tensor] = []
    with linear.register_forward_hook(lambda *args: seen.append(args[2])):
        yield seen


@contextmanager
def inputs_of(linear: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a linear layer."""
    seen: list[Tensor] = []
    with linear.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        yield seen


@contextmanager
def replaced_weights(
    weights: Mapping[nn.Linear, Tensor],
    biases: Mapping[nn.Linear, Tensor],
    dtype: torch.dtype,
) -> Iterator[None]:
    """Inside, linear layers have other weights, and other biases or their own in `dtype`."""
    own = {linear: (linear.weight, linear.bias) for linear in weights}
    try:
        for linear, weight in weights.items():
            is_leaf = isinstance(weight, nn.Parameter)
            linear.weight = weight if is_leaf else nn.Parameter(weight, requires_grad=False)
            bias = biases.get(linear, linear.bias)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for linear, (weight, bias) in own.items():
            linear.weight, linear.bias = weight, bias


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
    changed = any(is_patched(module) for module in mlp.module.modules())
    weight = mlp.down.weight
    if changed or weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 1, weight.shape[0], generator=generator)
    x = torch.cat([row * size for size in PROBE_SIZES], dim=1).to(weight.device, weight.dtype)
    output = mlp.module(x)
    gate, up = _gate_and_up(mlp, x)
    for name, act_fn in ACTIVATIONS.items():
        if torch.equal(mlp.down(act_fn(gate) * up), output):
            return name
    return None


def _gate_and_up(mlp: GatedMLP, x: Tensor) -> tuple[Tensor, ...]:
    """Return gate(x) and up(x): two tensors, or the halves of one."""
    if mlp.fused:
        halves: tuple[Tensor, ...] = mlp.gate(x).chunk(2, dim=-1)
        return halves
    return mlp.gate(x), mlp.up(x)


@contextmanager
def scored_mlp(
    mlp: GatedMLP, target: Target, options: TaylorOptions, needs_grad: bool, only_backward: bool
) -> Iterator[None]:
    """Inside, the MLP's forward is one whose backward makes the statistics."""
    if options.activation is None or options.parity:
        with (
            mlp.down.register_forward_pre_hook(_at_down_proj(target, options, needs_grad)),
            mlp.down.register_forward_hook(_behind_down_proj(target, options.sequences)),
        ):
            yield
        return
    anchor = torch.empty(0, requires_grad=True)  # so that there always is a backward

    def forward(x: Tensor) -> Tensor:
        output: Tensor = _ScoredMLP.apply(  # type: ignore[no-untyped-call]
            x, anchor, mlp, target, options, only_backward
        )
        return output

    def of_tokens(x: Tensor) -> Tensor:
        return forward(in_sequences(x, options.sequences)).view_as(x)

    mlp.module.forward = lambda x: forward(x) if x.dim() == 3 else of_tokens(x)
    try:
        yield
    finally:
        del mlp.module.forward


def _at_down_proj(
    target: Target, options: TaylorOptions, needs_grad: bool
) -> Callable[..., tuple[Tensor, ...]]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        act = args[0] if needs_grad else args[0].detach().requires_grad_()
        detached = act.detach()

        def at_gradient(grad: Tensor) -> None:
            both = (in_sequences(each, options.sequences) for each in (grad, detached))
            target.take(taylor_statistics(*both, parity=options.parity, **options.common))

        act.register_hook(at_gradient)
        return (act, *args[1:])

    return hook


def _behind_down_proj(target: Target, sequences: int) -> Callable[..., None]:
    def at_gradient(grad: Tensor) -> None:
        if target.take_gradient is not None:
            target.take_gradient(in_sequences(grad, sequences))

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
        target: Target,
        options: TaylorOptions,
        only_backward: bool,
    ) -> Tensor:
        gate, up = _gate_and_up(mlp, x)
        ctx.mlp, ctx.target, ctx.options = mlp, target, options
        first = not ctx.needs_input_grad[0]
        if first or not only_backward:
            assert options.activation is not None
            act = ACTIVATIONS[options.activation](gate) * up
        ctx.save_for_backward(*((act,) if first else (gate, up)))
        if only_backward:
            return x.new_full((), torch.nan).expand_as(x)
        output: Tensor = mlp.down(act)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        mlp: GatedMLP = ctx.mlp
        target: Target = ctx.target
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
