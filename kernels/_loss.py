"""The loss of a head as autograd sees it: its gradients are made in the forward pass and kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (hidden, weight, bias, weight_grads) -> (loss, d_hidden, d_weight, d_bias), as `loss_and_grads`.
Run = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, ...]]


class HeadLoss(torch.autograd.Function):
    """A scalar loss of hidden, weight and bias, once differentiable; `of` is its face."""

    @staticmethod
    def of(
        run: Run, grad_scale: float, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Return the loss that run makes; the gradients it returns carry grad_scale."""
        loss: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            run, grad_scale, hidden, weight, bias
        )
        return loss

    @staticmethod
    def forward(
        ctx: Any, run: Run, grad_scale: float, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Keep the gradients that are needed; without one of the weight it is not made."""
        loss, *grads = run(hidden, weight, bias, any(ctx.needs_input_grad[3:]))
        needed = zip(grads, ctx.needs_input_grad[2:], strict=True)
        ctx.save_for_backward(*(grad if needs else None for grad, needs in needed))
        ctx.grad_scale = grad_scale
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return d_loss times the kept gradients, each rounded once."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the loss of a head has no second derivative (create_graph=True)")
        factor = d_loss / ctx.grad_scale
        grads = (None if g is None else _times(g, factor) for g in ctx.saved_tensors)
        return None, None, *grads


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """Return factor · grad, computed in the wider dtype of both and rounded to that of grad."""
    # On a GPU a factor without dimensions would be rounded to the dtype of grad first.
    factor = factor.view([1] * grad.dim())
    return torch.mul(grad, factor, out=torch.empty_like(grad))
