"""The Triton kernels of `rms_norm.py`: rows in registers, or in two passes where they are long."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._dispatch import configuration
from hfprune_fast.kernels._triton import cdiv, jit, tl

# A row of 16384 is 16 numbers of each tensor for each of the 1024 threads that a program may have.
_LONGEST_ROW = 16384
# A program's tile: several short rows, such as those of q and k, or one block of a longer row.
_TILE = 4096
# 16 numbers a thread, in warps of 32 and of 64: 56 registers at most hold x, the gradient and the
# weight in fp32 beside each other, and four programs share a multiprocessor (computed).
_A_WARP = {"sm": {"numbers": 512}, "gfx": {"numbers": 1024}}


@jit
def _weight(w_ptr, offs_d, mask_d, FORM: tl.constexpr):
    w = tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if FORM == "gemma":
        w = 1.0 + w
    return w


@jit
def _scaled(n, w, dtype: tl.constexpr, FORM: tl.constexpr):
    if FORM == "llama":
        n = n.to(dtype).to(tl.float32)
    return (n * w).to(dtype)


@jit
def _rms_norm_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, stride_x, T, D, eps,
    FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Write y and 1 / sqrt(mean(x²) + eps) of ROWS rows; LONG: of rows of several blocks."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_t, offs_d = t < T, tl.arange(0, BLOCK_D)
    x_ptr += t[:, None] * stride_x
    y_ptr += t[:, None] * D
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if LONG:
        squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + offs_d
            mask = mask_t[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)
        for start in range(0, D, BLOCK_D):
            d = start + offs_d
            mask = mask_t[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32)
            y = _scaled(x * rstd[:, None], _weight(w_ptr, d, d < D, FORM), dtype, FORM)
            tl.store(y_ptr + d[None, :], y, mask=mask)
    else:
        mask = mask_t[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        w = _weight(w_ptr, offs_d, offs_d < D, FORM)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        tl.store(y_ptr + offs_d[None, :], _scaled(x * rstd[:, None], w, dtype, FORM), mask=mask)
    tl.store(rstd_ptr + t, rstd, mask=mask_t)


@jit
def _rms_norm_backward_kernel(
    g_ptr, x_ptr, w_ptr, rstd_ptr, d_x_ptr, stride_g, stride_x, T, D,
    FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Write r · (h - n · mean(h · n)) of ROWS rows, with h = w · g and n = x · r."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_t, offs_d = t < T, tl.arange(0, BLOCK_D)
    g_ptr += t[:, None] * stride_g
    x_ptr += t[:, None] * stride_x
    d_x_ptr += t[:, None] * D
    dtype: tl.constexpr = d_x_ptr.dtype.element_ty
    rstd = tl.load(rstd_ptr + t, mask=mask_t, other=0.0)[:, None]
    if LONG:
        products = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + offs_d
            mask = mask_t[:, None] & (d < D)[None, :]
            h = tl.load(g_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32)
            h *= _weight(w_ptr, d, d < D, FORM)
            n = tl.load(x_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32) * rstd
            products += h * n
        mean = (tl.sum(products, axis=1) / D)[:, None]
        for start in range(0, D, BLOCK_D):
            d = start + offs_d
            mask = mask_t[:, None] & (d < D)[None, :]
            h = tl.load(g_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32)
            h *= _weight(w_ptr, d, d < D, FORM)
            n = tl.load(x_ptr + d[None, :], mask=mask, other=0.0).to(tl.float32) * rstd
            tl.store(d_x_ptr + d[None, :], (rstd * (h - n * mean)).to(dtype), mask=mask)
    else:
        mask = mask_t[:, None] & (offs_d < D)[None, :]
        h = tl.load(g_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        h *= _weight(w_ptr, offs_d, offs_d < D, FORM)
        n = tl.load(x_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32) * rstd
        mean = (tl.sum(h * n, axis=1) / D)[:, None]
        tl.store(d_x_ptr + offs_d[None, :], (rstd * (h - n * mean)).to(dtype), mask=mask)


def _configuration(width: int, device: torch.device) -> dict[str, int]:
    is_long = width > _LONGEST_ROW
    block = _TILE if is_long else 1 << (width - 1).bit_length()
    rows, config = max(1, _TILE // block), configuration(_A_WARP, device)
    warps = rows * block // config.pop("numbers")
    return {"ROWS": rows, "BLOCK_D": block, "LONG": is_long, "num_warps": warps, **config}


def rms_norm_triton(rows: Tensor, weight: Tensor, eps: float, form: str) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on (T, D) rows of unit stride along D; return y and rstd (T,)."""
    count, width = rows.shape
    config = _configuration(width, rows.device)
    y, rstd = rows.new_empty(count, width), rows.new_empty(count, dtype=torch.float32)
    _rms_norm_kernel[(cdiv(count, config["ROWS"]),)](
        rows, weight, y, rstd, rows.stride(0), count, width, eps, FORM=form, **config
    )
    return y, rstd


def rms_norm_backward_triton(
    grad: Tensor, rows: Tensor, weight: Tensor, rstd: Tensor, form: str
) -> Tensor:
    """Launch the backward kernel on (T, D) rows of unit stride along D; return d_x."""
    count, width = rows.shape
    config = _configuration(width, rows.device)
    d_x = rows.new_empty(count, width)
    _rms_norm_backward_kernel[(cdiv(count, config["ROWS"]),)](
        grad, rows, weight, rstd, d_x, grad.stride(0), rows.stride(0), count, width,
        FORM=form, **config,
    )  # fmt: skip
    return d_x
