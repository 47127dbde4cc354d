"""Shannon entropy of softmax(logits), row by row, and its gradient.

For a row z of V logits, with p = softmax(z), d_i = z_i - max(z), s = Σ exp(d), u = Σ d exp(d):

    H        = -Σ_i p_i log p_i = log s - u/s                       (nats)
    dH/dz_i  = -p_i (log p_i + H) = -p_i (d_i - u/s)

with 0·log 0 = 0, so z_i = -inf (a masked vocabulary entry) gives exactly 0 and never NaN, and a row
of nothing but -inf has H = 0 and no gradient. The equation is the criterion of HFPrune,
arXiv 2603.08083, differentiated by hand. Some families transform the logits first,
z ← softcap · tanh(logit_scale · z / softcap); the gradient is then with respect to the logits
before the transform.

The reference is below; the pass over the rows is shared with other criteria (`_rows.py`,
`_rows_triton.py`, `csrc/row_pass.cpp`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfprune_fast.kernels._arguments import (
    check_logits,
    check_overwritten_logits,
    check_transform,
)
from hfprune_fast.kernels._operation import operation
from hfprune_fast.kernels._rows import rows_loss_and_grad


def softmax_entropy_grad_reference(
    logits: Tensor, row_scale: Tensor, *, softcap: float | None = None, logit_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (H, row_scale · dH/dlogits), through autograd and out of place; NaN for -inf."""
    raw = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
    with torch.enable_grad():
        z = raw * logit_scale
        if softcap is not None:
            masked = raw == -torch.inf
            z = (softcap * torch.tanh(z / softcap)).masked_fill(masked, -torch.inf)
        log_p = torch.log_softmax(z, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        (grad,) = torch.autograd.grad(entropy, raw, row_scale.to(z.dtype))
    return entropy.detach(), grad.to(logits.dtype)


@operation("softmax_entropy", differentiable=True)
def _softmax_entropy(
    logits: Tensor, softcap: float | None, logit_scale: float, backend: str | None
) -> Tensor:
    check_logits(logits)
    check_transform(softcap, logit_scale)
    return rows_loss_and_grad(logits, softcap=softcap, logit_scale=logit_scale, backend=backend)


@operation("softmax_entropy_backward", differentiable=True)  # raises in a second one
def _softmax_entropy_backward(
    logits: Tensor, d_entropy: Tensor, softcap: float | None, logit_scale: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    grad = torch.empty_like(logits)
    rows_loss_and_grad(
        logits, d_entropy, grad,
        softcap=softcap, logit_scale=logit_scale, backend=backend,
    )  # fmt: skip
    return grad


@operation("softmax_entropy_grad_", mutates_args=("logits",))
def _softmax_entropy_grad_(
    logits: Tensor, row_scale: Tensor, softcap: float | None, logit_scale: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    check_overwritten_logits(logits, row_scale)
    check_transform(softcap, logit_scale)
    return rows_loss_and_grad(
        logits, row_scale, logits,
        softcap=softcap, logit_scale=logit_scale, backend=backend,
    )  # fmt: skip


@_softmax_entropy.register_fake
@_softmax_entropy_grad_.register_fake
def _fake_entropy(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


@_softmax_entropy_backward.register_fake
def _fake_grad(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _backward(ctx: Any, d_entropy: Tensor) -> tuple[Tensor, None, None, None]:
    (logits,) = ctx.saved_tensors
    return _softmax_entropy_backward(logits, d_entropy, *ctx.options), None, None, None


_softmax_entropy.register_autograd(_backward, setup_context=_save_for_backward)


def softmax_entropy(
    logits: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Return H of each row of logits, differentiable once.

    H = -Σ_i p_i log p_i with p = softmax(z), the criterion of HFPrune (arXiv 2603.08083).

    Args:
        logits: (T, V) bf16, fp16, fp32 or fp64; rows of any stride, unit stride along V. A logit of
            -inf is a masked vocabulary entry: it adds exactly 0, also under a softcap.
        softcap: z ← softcap · tanh(z / softcap), after the scale; None for no cap.
        logit_scale: z ← logit_scale · z, positive.
        backend: "triton", "cpp" or "torch"; by default HFPRUNE_BACKEND, else triton on a GPU, cpp
            on a CPU and torch elsewhere and for fp64.

    Returns:
        H: (T,) in nats; fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: arguments of another shape, dtype or stride, or a backend that cannot run.
        RuntimeError: a second derivative is requested.

    The maths is fp32 (fp64 for fp64 logits). Memory traffic on a GPU: forward, one read of the
    logits; backward, one or two reads (the second one often from the L2 cache) and one write. The
    torch path reads them twice in the forward as well.
    """
    return _softmax_entropy(logits, softcap, logit_scale, backend)


def softmax_entropy_grad_(
    logits: Tensor,
    row_scale: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Overwrite logits with row_scale · dH/dlogits and return H.

    dH/dz_i = -p_i (log p_i + H), with respect to the logits before softcap and logit_scale.

    Args:
        logits: as in `softmax_entropy`; overwritten.
        row_scale: (T,) factor of each row's gradient, in memory of its own, for example 1 /
            sequence length. Where it is 0 the gradient is exactly 0, whatever the logits.
        softcap, logit_scale, backend: as in `softmax_entropy`.

    Returns:
        H: (T,) in nats; fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: arguments of another shape, dtype or stride, or a backend that cannot run.

    Not differentiable (torch has no autograd for an operation that overwrites its input). Memory
    traffic on a GPU: two reads of the logits, the second one in part from the L2 cache, and one
    write: 4 to 6 bytes a logit in bf16. The torch path has up to five temporaries of half a
    million elements.
    """
    return _softmax_entropy_grad_(logits, row_scale, softcap, logit_scale, backend)
