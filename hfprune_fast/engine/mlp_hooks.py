"""The autograd Function that scores inside a gated MLP, and the swap that puts it there.

Forward is the model's own: out = down(act_fn(gate(x)) * up(x)), of which only gate and up are kept.
Backward, given d_out, with a = act_fn(gate) * up:

    g = d_out · W_down                                      dloss/da
    statistics, d_gate, d_up = gated_taylor(g, gate, up)    overwrites gate and up
    d_x = d_gate · W_gate + d_up · W_up

No weight gets a gradient. Where x needs none either, as in the first layer, a is kept instead and
only the statistics are made. An MLP that is not known to compute just this is left as it is, and
hooked at the input of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
class Scoring:
    """How a micro-batch is scored; `take` is given the statistics of each backward."""

    take: Callable[[TaylorStatistics], None]
    token_mask: Tensor | None
    grad_scale: float
    parity: bool
    backend: str
    # Whether the backward that runs is the last one through the graph, which may overwrite it.
    is_last: Callable[[], bool] = lambda: True


@contextmanager
def scored(
    mlp: GatedMLP, scoring: Scoring, *, needs_grad: bool, only_backward: bool = False
) -> Iterator[None]:
    """The forward that runs inside is scored when its backward runs, inside or after.

    Args:
        needs_grad: whether the MLP's input must get a gradient; not so in the first layer.
        only_backward: the output's values are not needed, so a known MLP saves the product with
            W_down and puts NaN there, which shows if they are used all the same.
    """
    activation = None if scoring.parity else known_activation(mlp)
    if activation is None:
        handle = mlp.down.register_forward_pre_hook(_at_down_proj(scoring, needs_grad))
        try:
            yield
        finally:
            handle.remove()
        return
    anchor = torch.empty(0, requires_grad=True)  # so that there is a backward, whatever x needs

    def forward(x: Tensor) -> Tensor:
        output: Tensor = _ScoredMLP.apply(  # type: ignore[no-untyped-call]
            x, anchor, mlp, scoring, activation, only_backward
        )
        return output

    mlp.module.forward = forward
    try:
        yield
    finally:
        del mlp.module.forward


@contextmanager
def acts_of(mlp: GatedMLP, silent: bool = False) -> Iterator[list[Tensor]]:
    """Collect the inputs of down_proj; a silent MLP's output is 0."""
    seen: list[Tensor] = []
    handles = [mlp.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    if silent:
        handles.append(mlp.module.register_forward_hook(lambda *args: torch.zeros_like(args[2])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def known_activation(mlp: GatedMLP) -> str | None:
    """Return the activation's name in our kernels, or None for an MLP that must be hooked.

    Known are the MLP classes of transformers as they are: plain linear layers, no hooks, no forward
    of the instance's own, the activation's included.
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
    if (
        changed
        or not type(mlp.module).__module__.startswith("transformers.models.")
        or any(type(linear) is not nn.Linear for linear in linears)
    ):
        return None
    return _ACTIVATIONS.get(f"{type(act_fn).__module__}.{type(act_fn).__name__}")


def _at_down_proj(scoring: Scoring, needs_grad: bool) -> Callable[..., tuple[Tensor, ...]]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        act = args[0] if needs_grad else args[0].detach().requires_grad_()
        held = act.detach()

        def at_gradient(grad: Tensor) -> None:
            scoring.take(
                taylor_statistics(
                    grad,
                    held,
                    token_mask=scoring.token_mask,
                    parity=scoring.parity,
                    grad_scale=scoring.grad_scale,
                    backend=scoring.backend,
                )
            )

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
        scoring: Scoring,
        activation: str,
        only_backward: bool,
    ) -> Tensor:
        gate, up = mlp.gate(x), mlp.up(x)
        ctx.mlp, ctx.scoring, ctx.activation, ctx.done = mlp, scoring, activation, False
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
        if ctx.done:
            raise RuntimeError(
                "this MLP's backward has run and has overwritten its gate and up; "
                "run the forward again"
            )
        mlp: GatedMLP = ctx.mlp
        scoring: Scoring = ctx.scoring
        ctx.done = scoring.is_last()
        options: dict[str, Any] = {
            "token_mask": scoring.token_mask,
            "grad_scale": scoring.grad_scale,
            "backend": scoring.backend,
        }
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        rows = d_out.flatten(0, 1)
        grad = (rows @ mlp.down.weight).view(*d_out.shape[:2], -1)
        if len(saved) == 1:
            scoring.take(taylor_statistics(grad, saved[0], **options))
            return (None,) * 6
        statistics, d_gate, d_up = gated_taylor(
            grad, *saved, activation=ctx.activation, overwrite=ctx.done, **options
        )
        del grad
        scoring.take(statistics)
        d_x = d_gate.flatten(0, 1) @ mlp.gate.weight
        torch.addmm(d_x, d_up.flatten(0, 1), mlp.up.weight, out=d_x)
        return d_x.view_as(d_out), None, None, None, None, None
