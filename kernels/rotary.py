"""Rotary position embedding of queries and keys, in the form that turns halves of a head.

A head x of Dh numbers is two halves (x₁, x₂), as are cos and sin of the token's position:

    y₁ = x₁ cos₁ - x₂ sin₁        y₂ = x₂ cos₂ + x₁ sin₂

(Su et al., arXiv 2104.09864, as transformers' `rotate_half` pairs the numbers.) The gradient at x
is the transposed map of the gradient at y, which for cos and sin of equal halves turns back:

    d_x₁ = d_y₁ cos₁ + d_y₂ sin₂        d_x₂ = d_y₂ cos₂ - d_y₁ sin₁

Both products are rounded to the dtype of x before they are added, as transformers' are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfprune_fast.kernels._arguments import check_devices
from hfprune_fast.kernels._dispatch import choose, device_guard
from hfprune_fast.kernels._operation import operation
from hfprune_fast.kernels._rotary_triton import rotary_triton


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k turned, differentiable in all orders; as transformers writes it."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q_embed, k_embed = ((x * cos) + (_rotate_half(x) * sin) for x in (q, k))
    return q_embed, k_embed


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotary_torch(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, out: Tensor) -> None:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    other = -_rotate_half(x * sin) if transposed else _rotate_half(x) * sin
    out.copy_(x * cos + other)


# On a CPU this is plain torch: backend "cpp" is for what takes a CPU's time, and this does not.
IMPLEMENTATIONS = {"triton": rotary_triton, "cpp": _rotary_torch, "torch": _rotary_torch}


@operation("rotary", differentiable=True)
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, backend: str | None) -> Tensor:
    rotate = choose(IMPLEMENTATIONS, backend, x)
    out = torch.empty_like(x)
    if x.numel():
        with device_guard(x):
            rotate(x, cos.contiguous(), sin.contiguous(), transposed, out)
    return out


@_rotary.register_fake
def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _rotary(grad, cos, sin, not ctx.transposed, ctx.backend), None, None, None, None


_rotary.register_autograd(_backward, setup_context=_save_for_backward)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by the angles of their positions, differentiable in both.

    The equation is above (arXiv 2104.09864).

    Args:
        q, k: (B, H, T, Dh) and (B, K, T, Dh) bf16, fp16, fp32 or fp64; Dh is even, and all of it is
            turned. Any strides; unit stride along Dh is not copied.
        cos, sin: both (B, T, Dh), or (1, T, Dh) for all sequences; of the dtype of q. They get no
            gradient.
        backend: "triton" or "torch" ("cpp" is torch here); by default HFPRUNE_BACKEND, else triton
            on a GPU and torch elsewhere and for fp64.

    Returns:
        q and k turned, with their strides where they are dense.

    Raises:
        ValueError: arguments of another shape or dtype, cos or sin that require a gradient, or a
            backend that cannot run.

    The result is that of `rotary_reference` to the bit, as its gradients are. Memory traffic of the
    Triton kernel, forward and backward alike: one read and one write of q and k, 4 bytes an element
    in bf16, and two reads of cos and sin.
    """
    _check(q, k, cos, sin)
    q_embed: Tensor = _rotary(q, cos, sin, False, backend)
    k_embed: Tensor = _rotary(k, cos, sin, False, backend)
    return q_embed, k_embed


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or not q.is_floating_point() or q.shape[3] % 2:
        raise ValueError(
            f"q must be a (B, H, T, Dh) float tensor, Dh even, got {tuple(q.shape)} {q.dtype}"
        )
    batch, _, seq_len, width = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:], k.dtype) != (batch, seq_len, width, q.dtype):
        raise ValueError(
            f"k must be ({batch}, K, {seq_len}, {width}) {q.dtype} as q is, "
            f"got {tuple(k.shape)} {k.dtype}"
        )
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != q.dtype or tensor.shape not in (
            (batch, seq_len, width),
            (1, seq_len, width),
        ):
            raise ValueError(
                f"{name} must be ({batch} or 1, {seq_len}, {width}) {q.dtype}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} gets no gradient, got one that requires it")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must be {tuple(cos.shape)} as cos is, got {tuple(sin.shape)}")
    check_devices(q, k=k, cos=cos, sin=sin)
