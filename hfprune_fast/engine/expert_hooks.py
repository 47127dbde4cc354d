"""Everything that intercepts the experts of a layer: statistics, acts, and pruned experts.

transformers calls its module of experts as experts(x (T, D), chosen (T, k), weights (T, k)): which
experts each token chose, and by what their outputs are multiplied. Inside, here, the rows are
sorted by expert, and each expert runs on its own (n, D), as an MLP does:

    out_t = Σ_e w_te · y_te        y_te = down_e(act_te)

Backward, given d_out, with h = d_out · W_down of an expert's rows:

    g = w · h                                               dloss/dact
    d_w = Σ_f h_f · act_f + d_out · b_down                  through the router
    statistics, d_gate, d_up = gated_taylor(g, gate, up)
    d_x = d_gate · W_gate + d_up · W_up

and T_e = Σ_t |w_te · d_w_te| = Σ_t |<d_out_t, w_te · y_te>| is the Taylor term of the expert. A
token's experts are distinct, so rows are added to tokens without atomics: sums are repeatable.
Padding is routed nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.engine.mlp_hooks import ACTIVATIONS, PROBE_SIZES, Target, TaylorOptions
from hfprune_fast.engine.routing import Routing, Rows, routed_rows
from hfprune_fast.kernels import TaylorStatistics, gated_taylor, taylor_statistics
from hfprune_fast.models.experts import ExpertsMLP

# Takes an expert's rows, their input (n, D) and weights (n,), and returns their output (n, D).
Visit = Callable[[Rows, Tensor, Tensor], Tensor]


@contextmanager
def visited_experts(
    experts: ExpertsMLP,
    visit: Visit,
    token_mask: Tensor | None,
    sequences: int,
    stay: list[int] | None = None,
) -> Iterator[None]:
    """Inside, `visit` computes each expert's output; nothing is differentiated.

    Args:
        stay: the experts that tokens may choose, if not all: the others' entries are taken out of
            the router, as if the model had been written without them.
    """

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if stay is not None:
            chosen = torch.tensor(stay, device=chosen.device)[chosen]
        for rows in routed_rows(chosen, experts.count, token_mask, sequences):
            w = weights[rows.tokens, rows.choices]
            y = visit(rows, x[rows.tokens], w)
            out[rows.tokens] += (y * w[:, None]).to(out.dtype)
        return out

    with ExitStack() as stack:
        stack.enter_context(_replaced_forward(experts, forward))
        if stay is not None and len(stay) < experts.count:
            stack.enter_context(_cut_router(experts, stay))
        yield


@contextmanager
def _cut_router(experts: ExpertsMLP, stay: list[int]) -> Iterator[None]:
    """Inside, the router knows only these experts, numbered anew."""
    whole = [(module, leaf, tensor) for module, leaf, tensor in experts.per_expert()]
    counted = [m for m in {id(m): m for m, _, _ in whole}.values() if hasattr(m, "num_experts")]
    try:
        for module, leaf, tensor in whole:
            cut = tensor.detach()[torch.tensor(stay, device=tensor.device)]
            _put(module, leaf, cut)
        for module in counted:
            module.num_experts = len(stay)  # type: ignore[assignment]
        yield
    finally:
        for module, leaf, tensor in whole:
            _put(module, leaf, tensor)
        for module in counted:
            module.num_experts = experts.count  # type: ignore[assignment]


def _put(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


@contextmanager
def plain_experts(
    experts: ExpertsMLP | None, token_mask: Tensor | None, sequences: int
) -> Iterator[None]:
    """Inside, experts run as `scored_experts` runs them, to the bit; nothing is differentiated."""
    if experts is None:
        yield
        return
    of = experts

    def visit(rows: Rows, x: Tensor, _: Tensor) -> Tensor:
        return of.output(rows.expert, of.act(of.gate_up(rows.expert, x)))

    with visited_experts(of, visit, token_mask, sequences):
        yield


@contextmanager
def scored_experts(experts: ExpertsMLP, target: Target, options: TaylorOptions) -> Iterator[None]:
    """Inside, the experts' forward is one whose backward makes their statistics."""
    anchor = torch.empty(0, requires_grad=True)  # so that there always is a backward

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = _ScoredExperts.apply(  # type: ignore[no-untyped-call]
            x, weights, anchor, chosen, experts, target, options
        )
        return output

    with _replaced_forward(experts, forward):
        yield


@contextmanager
def _replaced_forward(experts: ExpertsMLP, forward: Callable[..., Tensor]) -> Iterator[None]:
    experts.module.forward = forward
    try:
        yield
    finally:
        del experts.module.forward


@torch.no_grad()
def known_gate(experts: ExpertsMLP) -> str | None:
    """Return the activation's name in our kernels, None if act is not act_fn(gate) * up.

    The module's own function is compared, bit by bit, for a few invented inputs.
    """
    weight = experts.module.down_proj
    if weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 2 * experts.width, generator=generator)
    gate_up = torch.cat([row * size for size in PROBE_SIZES]).to(weight.device, weight.dtype)
    gate, up = experts.halves(gate_up)
    act = experts.act(gate_up)
    for name, act_fn in ACTIVATIONS.items():
        if torch.equal(act_fn(gate) * up, act):
            return name
    return None


class _ScoredExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        anchor: Tensor,
        chosen: Tensor,
        experts: ExpertsMLP,
        target: Target,
        options: TaylorOptions,
    ) -> Tensor:
        out, routing = torch.zeros_like(x), Routing.of(experts)
        all_rows = routed_rows(chosen, experts.count, options.token_mask, options.sequences)
        gate_ups = []
        for rows in all_rows:
            gate_up = experts.gate_up(rows.expert, x[rows.tokens])
            y = experts.output(rows.expert, experts.act(gate_up))
            w = weights[rows.tokens, rows.choices]
            out[rows.tokens] += (y * w[:, None]).to(out.dtype)
            routing.add(rows, w, y)
            gate_ups.append(gate_up)
        target.routing = routing
        ctx.experts, ctx.target, ctx.options, ctx.rows = experts, target, options, all_rows
        ctx.save_for_backward(x, weights, *gate_ups)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        experts: ExpertsMLP = ctx.experts
        target: Target = ctx.target
        x, weights, *gate_ups = ctx.saved_tensors
        if target.take_experts_gradient is not None:
            target.take_experts_gradient(d_out)
        d_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        d_weights = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        for rows, gate_up in zip(ctx.rows, gate_ups, strict=True):
            d_y = d_out[rows.tokens]
            w = weights[rows.tokens, rows.choices]
            through = d_y @ experts.down(rows.expert)
            d_w = _rows_dot(through, experts.act(gate_up))
            bias = experts.down_bias(rows.expert)
            if bias is not None:
                d_w += _rows_dot(d_y, bias.expand_as(d_y))
            grad = (through * w[:, None]).to(through.dtype)
            statistics, d_gate_up = _statistics(experts, rows, grad, gate_up, ctx.options, target)
            taylor = (w.double() * d_w.double()).abs().sum() / ctx.options.grad_scale
            target.take_expert(rows.expert, statistics, taylor)
            if d_weights is not None:
                d_weights[rows.tokens, rows.choices] = d_w.to(d_weights.dtype)
            if d_x is not None:
                d_x[rows.tokens] += d_gate_up @ experts.gate_up_weight(rows.expert)
        return d_x, d_weights, None, None, None, None, None


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a·b of each row, (n,), fp32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(dim=-1)


def _statistics(
    experts: ExpertsMLP,
    rows: Rows,
    grad: Tensor,
    gate_up: Tensor,
    options: TaylorOptions,
    target: Target,
) -> tuple[TaylorStatistics, Tensor]:
    """Return an expert's statistics and the gradient at gate and up, (n, 2F) as the module's."""
    common: dict[str, Any] = {"grad_scale": options.grad_scale, "backend": options.backend}
    if options.experts_activation is None:
        with torch.enable_grad():
            leaf = gate_up.detach().requires_grad_()
            act = experts.act(leaf)
        statistics = taylor_statistics(rows.padded(grad), rows.padded(act.detach()), **common)
        (d_gate_up,) = torch.autograd.grad(act, leaf, grad)
        return statistics, d_gate_up
    d_gate_up = gate_up if target.last else torch.empty_like(gate_up)
    gate_and_up, gradients = experts.halves(gate_up), experts.halves(d_gate_up)
    statistics, d_gate, d_up = gated_taylor(
        *map(rows.padded, (grad, *gate_and_up)),
        activation=options.experts_activation,
        **common,
    )
    for into, gradient in zip(gradients, (d_gate, d_up), strict=True):
        into.copy_(rows.unpadded(gradient))
    return statistics, d_gate_up
