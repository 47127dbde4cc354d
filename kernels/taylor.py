"""First-order Taylor statistics of MLP neurons, summed over the tokens of whole sequences.

With a the input of down_proj and g = dloss/da, both (B, S, F), and x = g · a, per neuron j:

    l1   = Σ_bt |x_btj|              the paper's importance (arXiv 2603.08083)
    l2   = Σ_bt x_btj²
    mask = Σ_b (Σ_t x_btj)²          square of the derivative by a mask on the neuron (Fisher)
    act  = Σ_bt a_btj²

The kernel's programs each walk 128 tokens of one sequence and a block of neurons and write one fp32
partial of the four sums; a second kernel adds the partials in a fixed order in fp64, where the sum
over a whole sequence is squared for mask. There are no atomics, so a result repeats bit for bit.
The same kernel serves `gated_taylor.py`, where a comes from gate and up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_fast.kernels._activations import (
    check_activation,
    eager_gated,
    value_and_slope,
    value_and_slope_triton,
)
from hfprune_fast.kernels._arguments import check_devices, check_grad_scale
from hfprune_fast.kernels._dispatch import configuration, resolve_backend, undisturbed
from hfprune_fast.kernels._triton import cdiv, jit, tl

# Tokens a program walks, and a block of the torch path. At 16 bytes for 128 tokens of a neuron,
# writing and reading the partials adds 2.5 % to the 10 bytes an element of bf16.
_CHUNK_T = 128
# A program's tile; STAGES - 1 tiles are loaded ahead. 8 bf16 a thread make 16-byte loads.
# maxnreg keeps 4 programs on a multiprocessor and ptxas from spilling to have 6 (seen on sm_100).
_CONFIGS = {
    "sm": {"BLOCK_T": 8, "BLOCK_F": 128, "STAGES": 3, "num_warps": 4, "maxnreg": 128},
    "gfx": {"BLOCK_T": 16, "BLOCK_F": 128, "STAGES": 2, "num_warps": 4},
}
_SUM_CONFIG = {"BLOCK_C": 32, "BLOCK_F": 32, "num_warps": 4}


class TaylorStatistics(NamedTuple):
    """The four statistics: (F,) of one layer here, (L, F) of a model in scoring."""

    l1: Tensor
    l2: Tensor
    mask: Tensor
    act: Tensor


class Gated(NamedTuple):
    """What act is made of, all (B, S, F), and where the gradients go, which may be gate and up."""

    gate: Tensor
    up: Tensor
    d_gate: Tensor
    d_up: Tensor
    activation: str


def taylor_statistics_reference(grad: Tensor, act: Tensor) -> TaylorStatistics:
    """Return the statistics with every product whole, in fp64."""
    a = act.double()
    x = grad.double() * a
    return TaylorStatistics(
        l1=x.abs().sum(dim=(0, 1)),
        l2=x.square().sum(dim=(0, 1)),
        mask=x.sum(dim=1).square().sum(dim=0),
        act=a.square().sum(dim=(0, 1)),
    )


@jit
def _taylor_kernel(
    g_ptr, act_ptr, up_ptr, d_gate_ptr, d_up_ptr, is_token_ptr, partial_ptr,
    stride_gt, stride_at, stride_ut, stride_dgt, stride_dut, S, F,
    ACTIVATION: tl.constexpr, CHUNK_T: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial (4, F) sums of one chunk of one sequence; act_ptr is gate where up_ptr is given."""
    blocks_f, chunks = tl.cdiv(F, BLOCK_F), tl.cdiv(S, CHUNK_T)
    block_f, chunk = tl.program_id(0) % blocks_f, tl.program_id(0) // blocks_f
    first = chunk % chunks * CHUNK_T  # of the chunk's tokens, in its sequence
    row = (chunk // chunks).to(tl.int64) * S + first  # the same, in all tokens
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
    l1 = tl.zeros([BLOCK_F], tl.float64)
    l2 = tl.zeros([BLOCK_F], tl.float64)
    mask_sum = tl.zeros([BLOCK_F], tl.float64)
    act_sum = tl.zeros([BLOCK_F], tl.float64)
    for b in range(B):
        x_sum = tl.zeros([BLOCK_F], tl.float64)
        for start in range(0, chunks, BLOCK_C):
            c = start + offs_c
            mask = (c < chunks)[:, None] & mask_f[None, :]
            row = (b * chunks + c).to(tl.int64)[:, None]  # [BLOCK_C, 1]
            p = partial_ptr + row * 4 * F + offs_f[None, :]
            l1 += tl.sum(tl.load(p, mask=mask, other=0.0).to(tl.float64), axis=0)
            l2 += tl.sum(tl.load(p + F, mask=mask, other=0.0).to(tl.float64), axis=0)
            x_sum += tl.sum(tl.load(p + 2 * F, mask=mask, other=0.0).to(tl.float64), axis=0)
            act_sum += tl.sum(tl.load(p + 3 * F, mask=mask, other=0.0).to(tl.float64), axis=0)
        mask_sum += x_sum * x_sum
    tl.store(out_ptr + offs_f, l1, mask=mask_f)
    tl.store(out_ptr + F + offs_f, l2, mask=mask_f)
    tl.store(out_ptr + 2 * F + offs_f, mask_sum, mask=mask_f)
    tl.store(out_ptr + 3 * F + offs_f, act_sum, mask=mask_f)


def _statistics_triton(grad: Tensor, act: Tensor | Gated, token_mask: Tensor | None) -> Tensor:
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
    """(B, S, F) as (B·S, F) with unit stride along F; a copy where strides allow no view."""
    rows = tensor.flatten(0, 1)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _is_rows(tensor: Tensor) -> bool:
    """Whether (B, S, F) is B·S rows of F neighbours that do not overlap, so can be written."""
    (batch, seq_len, width), (stride_b, stride_t, stride_f) = tensor.shape, tensor.stride()
    if seq_len == 1:
        stride_t = stride_b
    one_stride = batch == 1 or seq_len == 1 or stride_b == seq_len * stride_t
    apart = stride_t >= width or batch * seq_len == 1
    return tensor.numel() == 0 or (one_stride and apart and (stride_f == 1 or width == 1))


def _statistics_torch(grad: Tensor, act: Tensor | Gated, token_mask: Tensor | None) -> Tensor:
    batch, seq_len, width = grad.shape
    total = grad.new_zeros(4, width, dtype=torch.float64)
    for b in range(batch):
        x_sum = torch.zeros_like(total[0])
        for start in range(0, seq_len, _CHUNK_T):
            block = b, slice(start, start + _CHUNK_T)
            sources = (grad, *act[:2]) if isinstance(act, Gated) else (grad, act)
            g, a, *rest = (source[block] for source in sources)
            if token_mask is not None:
                padding = ~token_mask[block][:, None]
                g, a, *rest = (tensor.masked_fill(padding, 0) for tensor in (g, a, *rest))
            if isinstance(act, Gated):
                dtype = torch.promote_types(g.dtype, torch.float32)
                g, gate, up = (tensor.to(dtype) for tensor in (g, a, *rest))
                value, slope = value_and_slope(gate, act.activation)
                a = value * up
                gradients = slope.mul_(g).mul_(up), value.mul_(g)
            a = a.double()
            x = g.double() * a
            if isinstance(act, Gated):  # after the last use of the inputs: they may be the same
                act.d_gate[block], act.d_up[block] = gradients
            total[0] += x.abs().sum(dim=0)
            total[1] += x.square().sum(dim=0)
            total[3] += a.square().sum(dim=0)
            x_sum += x.sum(dim=0)
        total[2] += x_sum.square_()
    return total


def _statistics_parity(grad: Tensor, act: Tensor | Gated) -> Tensor:
    """Round every product, sum over a sequence and running total to the dtype, as HFPrune does."""
    gated = act if isinstance(act, Gated) else None
    if isinstance(act, Gated):
        act, *gradients = eager_gated(grad, act.gate, act.up, act.activation)
    total = grad.new_zeros(4, grad.shape[2])
    for b in range(grad.shape[0]):
        a = act[b]
        x = a * grad[b]
        total[0] += x.abs().sum(dim=0)
        total[1] += x.square().sum(dim=0)
        total[2] += x.sum(dim=0).square_()
        total[3] += a.square().sum(dim=0)
    if gated is not None:  # after the last use of grad: they may be the same
        gated.d_gate.copy_(gradients[0])
        gated.d_up.copy_(gradients[1])
    return total


def taylor_sums(
    grad: Tensor,
    act: Tensor | Gated,
    *,
    token_mask: Tensor | None,
    parity: bool,
    grad_scale: float,
    backend: str | None,
) -> Tensor:
    """Check the arguments, run, and take the powers of grad_scale out of the (4, F) sums."""
    _check(grad, act, token_mask, grad_scale)
    if parity and (backend == "triton" or token_mask is not None or grad_scale != 1):
        raise ValueError(
            "parity=True is plain torch over whole sequences: no triton, token_mask or grad_scale"
        )
    backend = resolve_backend("torch" if parity and backend is None else backend, grad)
    if grad.numel() == 0:
        return grad.new_zeros(4, grad.shape[2], dtype=sum_dtype(grad, parity))
    with undisturbed(grad):
        if parity:
            return _statistics_parity(grad, act)
        run = _statistics_triton if backend == "triton" else _statistics_torch
        total = run(grad, act, token_mask)
    if grad_scale != 1:
        total[0] /= grad_scale
        total[1:3] /= grad_scale**2
    return total


@torch.library.custom_op("hfprune_fast::taylor_statistics", mutates_args=())
def _taylor_statistics(
    grad: Tensor, act: Tensor, token_mask: Tensor | None, parity: bool, grad_scale: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    return taylor_sums(
        grad, act,
        token_mask=token_mask, parity=parity, grad_scale=grad_scale, backend=backend,
    )  # fmt: skip


@_taylor_statistics.register_fake
def _(grad, act, token_mask, parity, *_):
    return grad.new_empty(4, grad.shape[2], dtype=sum_dtype(grad, parity))


def taylor_statistics(
    grad: Tensor,
    act: Tensor,
    *,
    token_mask: Tensor | None = None,
    parity: bool = False,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> TaylorStatistics:
    """Return the four statistics of a micro-batch of whole sequences.

    With x = grad · act: l1 = Σ|x|, l2 = Σx², mask = Σ_seq (Σ_t x)², act = Σ act²; l1 is the
    importance of HFPrune (arXiv 2603.08083). For a first layer, and for a model that is only hooked
    at the input of down_proj.

    Args:
        grad: (B, S, F) dloss/dact, any float dtype; a copy is made unless B and S share one stride.
        act: (B, S, F), the input of down_proj, same dtype.
        token_mask: (B, S) bool, False where there is padding, which is not counted or even read.
        parity: round every product, sum over a sequence and running total to the dtype of the
            input, as the reference implementation does, and return that dtype. Plain torch, without
            token_mask or grad_scale.
        grad_scale: power of two that grad carries (for fp16); taken out of the sums, exactly.
        backend: "triton" or "torch"; by default what HFPRUNE_BACKEND says, else triton on a GPU and
            torch elsewhere and for fp64. Parity is torch whatever the environment says.

    Returns:
        TaylorStatistics of (F,) tensors on the device of act, fp64 (parity: the input's dtype).

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.

    torch: fp64 throughout. triton: products and sums over 128 tokens in fp32, so terms below 1e-38
    vanish, and fp64 beyond; 4.25 bytes an element of traffic in bf16, 0.25 of them partial sums
    (more where sequences are shorter than 128 tokens: 32 bytes a neuron and sequence).
    """
    total = _taylor_statistics(grad.detach(), act.detach(), token_mask, parity, grad_scale, backend)
    return TaylorStatistics(*total.unbind())


def _check(grad: Tensor, act: Tensor | Gated, token_mask: Tensor | None, grad_scale: float) -> None:
    if grad.dim() != 3 or not grad.is_floating_point():
        raise ValueError(
            f"grad must be a (B, S, F) float tensor, got {tuple(grad.shape)} {grad.dtype}"
        )
    if isinstance(act, Gated):
        others = {"gate": act.gate, "up": act.up, "d_gate": act.d_gate, "d_up": act.d_up}
        check_activation(act.activation)
    else:
        others = {"act": act}
    for name, tensor in others.items():
        if (tensor.shape, tensor.dtype, tensor.device) != (grad.shape, grad.dtype, grad.device):
            raise ValueError(
                f"{name} must be {tuple(grad.shape)} {grad.dtype} on {grad.device} as grad is, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if name in ("d_gate", "d_up") and not _is_rows(tensor):
            raise ValueError(
                "the gradients' tensors (gate and up with overwrite=True, else out) must have unit "
                f"stride along F and one stride over B and S, got {tensor.stride()}"
            )
    if isinstance(act, Gated) and act.d_gate.data_ptr() == act.d_up.data_ptr() != 0:
        raise ValueError("the gradients at gate and up would be written to one and the same tensor")
    if token_mask is not None and (
        token_mask.shape != grad.shape[:2] or token_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"token_mask must be {tuple(grad.shape[:2])} bool, "
            f"got {tuple(token_mask.shape)} {token_mask.dtype}"
        )
    check_devices(grad, token_mask=token_mask)
    check_grad_scale(grad_scale)


def sum_dtype(grad: Tensor, parity: bool) -> torch.dtype:
    return grad.dtype if parity else torch.float64
