"""RMS norm with a frozen weight, and its gradient at the input.

For a row x of D numbers, with r = 1 / sqrt(Σ x² / D + eps) and n = x · r:

    y = w · n        dloss/dx_i = r · (h_i - n_i · Σ_j h_j n_j / D)    with h = w · dloss/dy

(Zhang and Sennrich, arXiv 1910.07467.) The maths is fp32. Families differ in what is rounded to the
dtype of x, and where, which `form` names:

    "llama"   w · round(n)         Llama's, Qwen's, Mistral's
    "gemma"   round((1 + w) · n)   Gemma's, whose weights are around 0
    "olmo2"   round(w · n)         OLMo 2's, gpt-oss'

The backward makes n again from x and r, which is one fp32 a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfprune_fast.kernels._arguments import check_devices
from hfprune_fast.kernels._dispatch import choose, device_guard
from hfprune_fast.kernels._operation import operation
from hfprune_fast.kernels._rms_norm_triton import rms_norm_backward_triton, rms_norm_triton

FORMS = ("llama", "gemma", "olmo2")


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float, form: str = "llama") -> Tensor:
    """Return the norm of each row, differentiable in all orders; as transformers writes it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "llama":
        return weight * n.to(x.dtype)
    return (n * (1.0 + weight.to(n.dtype) if form == "gemma" else weight)).to(x.dtype)


def _rms_norm_torch(rows: Tensor, weight: Tensor, eps: float, form: str) -> tuple[Tensor, Tensor]:
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return rms_norm_reference(rows, weight, eps=eps, form=form), rstd.squeeze(-1)


def _rms_norm_backward_torch(
    grad: Tensor, rows: Tensor, weight: Tensor, rstd: Tensor, form: str
) -> Tensor:
    """Return the gradient at the rows, rounded as autograd would: the steps are its own."""
    wide, r = rows.to(rstd.dtype), rstd[:, None]
    if form == "llama":
        d_n = (grad * weight).to(rstd.dtype)
    else:
        d_n = grad.to(rstd.dtype) * (1.0 + weight.to(rstd.dtype) if form == "gemma" else weight)
    d_mean = -0.5 * (d_n * wide).sum(-1, keepdim=True) * r.pow(3)
    return (d_n * r + d_mean.expand_as(wide) / rows.shape[1] * (2 * wide)).to(rows.dtype)


# On a CPU these are plain torch: backend "cpp" is for what takes a CPU's time, and norms do not.
IMPLEMENTATIONS = {"triton": rms_norm_triton, "cpp": _rms_norm_torch, "torch": _rms_norm_torch}
BACKWARD = {
    "triton": rms_norm_backward_triton,
    "cpp": _rms_norm_backward_torch,
    "torch": _rms_norm_backward_torch,
}


@operation("rms_norm", differentiable=True)
def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, form: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    _check(x, weight, eps, form)
    norm = choose(IMPLEMENTATIONS, backend, x)
    if x.numel() == 0:
        return _fake_norm(x)
    with device_guard(x):
        y, rstd = norm(_rows(x), weight.contiguous(), eps, form)
    return y.view(x.shape), rstd


@operation("rms_norm_backward", differentiable=True)  # raises in a second one
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: str, backend: str | None
) -> Tensor:
    backward = choose(BACKWARD, backend, x)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    with device_guard(x):
        return backward(_rows(grad), _rows(x), weight.contiguous(), rstd, form).view(x.shape)


@_rms_norm.register_fake
def _fake_norm(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    maths_dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=maths_dtype)


@_rms_norm_backward.register_fake
def _fake_grad(grad: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _rms_norm_backward(d_y, *ctx.saved_tensors, *ctx.options), None, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_save_for_backward)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, form: str = "llama", backend: str | None = None
) -> Tensor:
    """Return w · x / sqrt(mean(x²) + eps) of each row, differentiable once, at x alone.

    The equation is above, as are the three forms (arXiv 1910.07467).

    Args:
        x: (..., D) bf16, fp16, fp32 or fp64. Rows that no view makes (T, D) of unit stride along D
            are copied.
        weight: (D,) of the dtype of x, frozen: it gets no gradient.
        eps: added to the mean of squares.
        form: "llama", "gemma" or "olmo2": what is rounded to the dtype of x, and where.
        backend: "triton" or "torch" ("cpp" is torch here); by default HFPRUNE_BACKEND, else triton
            on a GPU and torch elsewhere and for fp64.

    Returns:
        (..., D) of the dtype of x, contiguous.

    Raises:
        ValueError: arguments of another shape or dtype, a weight that requires a gradient, or a
            backend that cannot run.
        RuntimeError: a second derivative is requested.

    The maths is fp32 (fp64 for fp64). Memory traffic of the Triton kernels, for rows of 16384 and
    less: forward, one read of x and one write, 4 bytes an element in bf16, and 4 a row; backward,
    one read of x and of the gradient and one write, 6 bytes, and 4 a row. Longer rows are read
    twice, the second time often from the L2 cache.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen, as it gets no gradient; got one that requires it")
    y: Tensor = _rms_norm(x, weight, eps, form, backend)[0]
    return y


def _rows(tensor: Tensor) -> Tensor:
    """Return (..., D) as (T, D) with unit stride along D; a copy if no view can be."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _check(x: Tensor, weight: Tensor, eps: float, form: str) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a (..., D) float tensor, got {tuple(x.shape)} {x.dtype}")
    if (weight.shape, weight.dtype) != (x.shape[-1:], x.dtype):
        raise ValueError(
            f"weight must be ({x.shape[-1]},) {x.dtype} as x is, "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )
    check_devices(x, weight=weight)
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must be a number in 0 .. 1, got {eps}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
