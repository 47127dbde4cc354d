"""The Triton kernels of the Taylor statistics; the equations are in `taylor.py`.

Each program of the first kernel walks 128 tokens of one sequence and a block of neurons, and writes
one fp32 partial of the four sums. The second kernel adds the partials in a fixed order in fp64, and
squares the sum over each sequence for fisher_mask. There are no atomics, so a result repeats bit
for bit. With gate and up in place of act, the first kernel also writes the gradients of
`gated_taylor.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._activations import Gated, value_and_slope_triton
from hfprune_fast.kernels._dispatch import configuration
from hfprune_fast.kernels._triton import cdiv, jit, tl

# Tokens a program walks. At 16 bytes for 128 tokens of a neuron, writing and reading the partials
# adds 2.5 % to the 10 bytes an element of bf16.
_CHUNK_T = 128
# A program's tile; STAGES - 1 tiles are loaded ahead. 8 bf16 a thread make 16-byte loads.
# maxnreg keeps 4 programs on a multiprocessor and ptxas from spilling to have 6 (seen on sm_100).
_CONFIGS = {
    "sm": {"BLOCK_T": 8, "BLOCK_F": 128, "STAGES": 3, "num_warps": 4, "maxnreg": 128},
    "gfx": {"BLOCK_T": 16, "BLOCK_F": 128, "STAGES": 2, "num_warps": 4},
}
# 8 chunks: those of a sequence of 1024 tokens, so that no lane of it is masked.
_SUM_CONFIG = {"BLOCK_C": 8, "BLOCK_F": 64, "num_warps": 4, "enable_fp_fusion": True}


@jit
def _taylor_kernel(
    g_ptr, act_ptr, up_ptr, d_gate_ptr, d_up_ptr, is_token_ptr, partial_ptr,
    stride_gt, stride_at, stride_ut, stride_dgt, stride_dut, S, F,
    ACTIVATION: tl.constexpr, CHUNK_T: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write (4, F) sums of one chunk of one sequence; with up_ptr, act_ptr is gate."""
    blocks_f, chunks = tl.cdiv(F, BLOCK_F), tl.cdiv(S, CHUNK_T)
    block_f, chunk = tl.program_id(0) % blocks_f, tl.program_id(0) // blocks_f
    first = chunk % chunks * CHUNK_T  # first token of the chunk, counted in its sequence
    row = (chunk // chunks).to(tl.int64) * S + first  # the same, counted in the batch
    offs_f = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    g_ptr += row * stride_gt + offs_f[None, :]
    act_ptr += row * stride_at + offs_f[None, :]
    if up_ptr is not None:
        up_ptr += row * stride_ut + offs_f[None, :]
        d_gate_ptr += row * stride_dgt + offs_f[None, :]
        d_up_ptr += row * stride_dut + offs_f[None, :]

    l1 = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    l2 = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    x_sum = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    act_sum = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    tokens = tl.minimum(CHUNK_T, S - first)
    for start in tl.range(0, tokens, BLOCK_T, num_stages=STAGES):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < tokens)[:, None] & mask_f[None, :]
        counted = mask
        if is_token_ptr is not None:
            is_token = tl.load(is_token_ptr + row + t, mask=t < tokens, other=0) != 0
            counted = mask & is_token[:, None]
        t = t.to(tl.int64)[:, None]  # [BLOCK_T, 1]
        g = tl.load(g_ptr + t * stride_gt, mask=counted, other=0.0).to(tl.float32)
        a = tl.load(act_ptr + t * stride_at, mask=counted, other=0.0).to(tl.float32)
        if up_ptr is not None:
            up = tl.load(up_ptr + t * stride_ut, mask=counted, other=0.0).to(tl.float32)
            value, slope = value_and_slope_triton(a, ACTIVATION)
            d_gate = (slope * g * up).to(d_gate_ptr.dtype.element_ty)
            d_up = (g * value).to(d_up_ptr.dtype.element_ty)
            tl.store(d_gate_ptr + t * stride_dgt, d_gate, mask=mask)
            tl.store(d_up_ptr + t * stride_dut, d_up, mask=mask)
            a = value * up
        x = g * a
        l1 += tl.abs(x)
        l2 += x * x
        x_sum += x
        act_sum += a * a
    partial_ptr += chunk.to(tl.int64) * 4 * F + offs_f
    tl.store(partial_ptr, tl.sum(l1, axis=0), mask=mask_f)
    tl.store(partial_ptr + F, tl.sum(l2, axis=0), mask=mask_f)
    tl.store(partial_ptr + 2 * F, tl.sum(x_sum, axis=0), mask=mask_f)
    tl.store(partial_ptr + 3 * F, tl.sum(act_sum, axis=0), mask=mask_f)


@jit
def _add_partials_kernel(
    partial_ptr, out_ptr, B, chunks, F, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Add (B, chunks, 4, F) fp32 partials to (4, F) fp64, in the order of sequences and chunks."""
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    offs_c = tl.arange(0, BLOCK_C)
    # Sums of every BLOCK_C-th chunk, reduced at the end; that of x at the end of each sequence.
    l1 = tl.zeros([BLOCK_C, BLOCK_F], tl.float64)
    l2 = tl.zeros([BLOCK_C, BLOCK_F], tl.float64)
    act_sum = tl.zeros([BLOCK_C, BLOCK_F], tl.float64)
    mask_sum = tl.zeros([BLOCK_F], tl.float64)
    for b in range(B):
        x_sum = tl.zeros([BLOCK_C, BLOCK_F], tl.float64)
        for start in range(0, chunks, BLOCK_C):
            c = start + offs_c
            mask = (c < chunks)[:, None] & mask_f[None, :]
            row = (b * chunks + c).to(tl.int64)[:, None]  # [BLOCK_C, 1]
            p = partial_ptr + row * 4 * F + offs_f[None, :]
            l1 += tl.load(p, mask=mask, other=0.0).to(tl.float64)
            l2 += tl.load(p + F, mask=mask, other=0.0).to(tl.float64)
            x_sum += tl.load(p + 2 * F, mask=mask, other=0.0).to(tl.float64)
            act_sum += tl.load(p + 3 * F, mask=mask, other=0.0).to(tl.float64)
        in_sequence = tl.sum(x_sum, axis=0)
        mask_sum += in_sequence * in_sequence
    tl.store(out_ptr + offs_f, tl.sum(l1, axis=0), mask=mask_f)
    tl.store(out_ptr + F + offs_f, tl.sum(l2, axis=0), mask=mask_f)
    tl.store(out_ptr + 2 * F + offs_f, mask_sum, mask=mask_f)
    tl.store(out_ptr + 3 * F + offs_f, tl.sum(act_sum, axis=0), mask=mask_f)


def statistics_triton(grad: Tensor, act: Tensor | Gated, token_mask: Tensor | None) -> Tensor:
    """Launch both kernels; return the (4, F) fp64 sums and write the gradients of a Gated."""
    batch, seq_len, width = grad.shape
    chunks = cdiv(seq_len, _CHUNK_T)
    partial = grad.new_empty(batch * chunks, 4, width, dtype=torch.float32)
    out = grad.new_empty(4, width, dtype=torch.float64)
    config = configuration(_CONFIGS, grad.device)
    sources = act[:4] if isinstance(act, Gated) else (act, None, None, None)
    tensors = [None if t is None else _rows(t) for t in (grad, *sources)]
    _taylor_kernel[(batch * chunks * cdiv(width, config["BLOCK_F"]),)](
        *tensors,
        None if token_mask is None else token_mask.contiguous().view(torch.uint8),
        partial,
        *(0 if t is None else t.stride(0) for t in tensors),
        seq_len,
        width,
        ACTIVATION=act.activation if isinstance(act, Gated) else None,
        CHUNK_T=_CHUNK_T,
        **config,
    )
    _add_partials_kernel[(cdiv(width, _SUM_CONFIG["BLOCK_F"]),)](
        partial, out, batch, chunks, width, **_SUM_CONFIG
    )
    return out


def _rows(tensor: Tensor) -> Tensor:
    """Return (B, S, F) as (B·S, F) with unit stride along F; a copy if no view can be."""
    rows = tensor.flatten(0, 1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
