"""The Triton kernel of `rotary.py`: a program turns the heads of one token."""

from __future__ import annotations

from torch import Tensor

from hfprune_fast.kernels._triton import jit, tl

# A program's tile of each half, at most, and the part of it of a warp of 32: 8 numbers a thread,
# which bf16 loads in 16 bytes.
_TILE, _A_WARP = 1024, 256


@jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh,
    stride_yt, stride_cb, T, H,
    TRANSPOSED: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn (H, 2 · HALF) of one token, or with TRANSPOSED a gradient at it."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    b = (tl.program_id(0) // T).to(tl.int64)
    t = (tl.program_id(0) % T).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HALF
    at = b * stride_cb + t * (2 * HALF) + offs_d
    cos_1 = tl.load(cos_ptr + at, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + at + HALF, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + at, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + at + HALF, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        sin_1, sin_2 = -sin_2, -sin_1
    x_ptr += b * stride_xb + t * stride_xt + offs_d[None, :]
    y_ptr += b * stride_yb + t * stride_yt + offs_d[None, :]
    for start in range(0, H, BLOCK_H):
        h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]  # [BLOCK_H, 1]
        mask = (h < H) & mask_d[None, :]
        x_1 = tl.load(x_ptr + h * stride_xh, mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(x_ptr + h * stride_xh + HALF, mask=mask, other=0.0).to(tl.float32)
        y_1 = (x_1 * cos_1).to(dtype).to(tl.float32) - (x_2 * sin_1).to(dtype).to(tl.float32)
        y_2 = (x_2 * cos_2).to(dtype).to(tl.float32) + (x_1 * sin_2).to(dtype).to(tl.float32)
        tl.store(y_ptr + h * stride_yh, y_1.to(dtype), mask=mask)
        tl.store(y_ptr + h * stride_yh + HALF, y_2.to(dtype), mask=mask)


def _configuration(heads: int, width: int) -> dict[str, int]:
    block_d = 1 << (width // 2 - 1).bit_length()
    tile = min(_TILE, max(_A_WARP, block_d << (heads - 1).bit_length()))
    config = {"BLOCK_H": max(1, tile // block_d), "BLOCK_D": block_d, "num_warps": tile // _A_WARP}
    # A fused product and sum would round once where transformers rounds twice.
    return {**config, "enable_fp_fusion": False}


def rotary_triton(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool, out: Tensor) -> None:
    """Launch the kernel on (B, H, T, Dh); cos and sin are contiguous, and out has any strides."""
    batch, heads, seq_len, width = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = out if out.stride(3) == 1 else out.new_empty(out.shape)
    _rotary_kernel[(batch * seq_len,)](
        x, cos, sin, y, *x.stride()[:3], *y.stride()[:3],
        0 if len(cos) == 1 else cos.stride(0), seq_len, heads,
        TRANSPOSED=transposed, HALF=width // 2, **_configuration(heads, width),
    )  # fmt: skip
    if y is not out:
        out.copy_(y)
