"""Shannon entropy of softmax(logits), row by row, and its gradient.

For a row z of V logits, with p = softmax(z), d_i = z_i - max(z), s = Σ exp(d), u = Σ d exp(d):

    H        = -Σ_i p_i log p_i = log s - u/s                       (nats)
    dH/dz_i  = -p_i (log p_i + H) = -p_i (d_i - u/s)

with 0·log 0 = 0, so z_i = -inf (a masked vocabulary entry) gives exactly 0 and never NaN, and a row
of nothing but -inf has H = 0 and no gradient. The equation is the criterion of HFPrune,
arXiv 2603.08083, differentiated by hand. Some families transform the logits first,
z ← softcap · tanh(logit_scale · z / softcap); the gradient is then that at the logits given.

The kernel makes one pass for (max, s, u): when the maximum rises by δ, with α = exp(-δ),
u ← α (u - δ s) and s ← α s. A second pass over the row makes the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hfprune_fast.kernels._arguments import check_devices, check_transform
from hfprune_fast.kernels._dispatch import configuration, resolve_backend, undisturbed
from hfprune_fast.kernels._triton import jit, tl

# Elements of a block of rows on the torch path: its temporaries stay in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 19
# One row a program. BLOCK_V logits a step, STAGES - 1 steps loaded ahead; one program of 32 warps
# fills a multiprocessor, so that the rows in flight (132 x 256 KB of bf16 on an H200) stay in L2.
_CONFIGS = {
    "sm": {"BLOCK_V": 8192, "STAGES": 3, "num_warps": 32},
    "gfx": {"BLOCK_V": 8192, "STAGES": 2, "num_warps": 8},
}


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


@jit
def _load_logits(
    z_ptr, offs_v, V, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, MASKED: tl.constexpr
):
    if MASKED:
        z = tl.load(z_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
    else:
        z = tl.load(z_ptr + offs_v).to(tl.float32)
    if LOGIT_SCALE != 1.0:
        z *= LOGIT_SCALE
    if SOFTCAP is not None:
        z = tl.where(z == float("-inf"), z, SOFTCAP * _tanh(z * (1 / SOFTCAP)))
    return z


@jit
def _tanh(x):
    """To a few units in the last place; near 0, where 1 - exp(-2x) cancels, by its series."""
    e = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@jit
def _add_to_sums(z, m, s, u):
    """Take logits z into (m, s, u); s and u are one partial sum a column of z."""
    m_new = tl.maximum(m, tl.max(z, axis=0))
    # -inf - -inf would be NaN: no finite logit yet, so nothing to rescale and every exp is 0.
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    # exp(-200) is 0 in fp32; without the bound, delta · s would be -inf and its product NaN.
    delta = tl.where(m == float("-inf"), 0.0, tl.maximum(m - base, -200.0))
    alpha = tl.exp(delta)
    d = z - base
    e = tl.exp(d)
    u = alpha * (u + delta * s) + tl.where(e == 0, 0.0, d * e)
    s = alpha * s + e
    return m_new, s, u


@jit
def _store_grad(
    z_ptr, grad_ptr, offs_v, V, base, u_over_s, factor,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    z = _load_logits(z_ptr, offs_v, V, SOFTCAP, LOGIT_SCALE, MASKED)
    d = z - base
    e = tl.where(factor == 0, 0.0, tl.exp(d))
    grad = e * factor * (d - u_over_s)
    if SOFTCAP is not None:
        grad *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
    grad = tl.where(e == 0, 0.0, grad).to(grad_ptr.dtype.element_ty)
    if MASKED:
        tl.store(grad_ptr + offs_v, grad, mask=offs_v < V)
    else:
        tl.store(grad_ptr + offs_v, grad)


@jit
def _softmax_entropy_kernel(
    z_ptr, grad_ptr, row_scale_ptr, entropy_ptr, stride_zt, stride_gt, V,
    SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, WRITE_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zt
    offs_v = tl.arange(0, BLOCK_V)
    # Whole steps need no mask, which would split 16-byte loads where V is odd.
    whole = V // BLOCK_V * BLOCK_V

    m = -float("inf")
    s = tl.zeros([BLOCK_V], tl.float32)
    u = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        z = _load_logits(z_ptr, start + offs_v, V, SOFTCAP, LOGIT_SCALE, False)
        m, s, u = _add_to_sums(z, m, s, u)
    if whole < V:
        z = _load_logits(z_ptr, whole + offs_v, V, SOFTCAP, LOGIT_SCALE, True)
        m, s, u = _add_to_sums(z, m, s, u)
    nothing = m == float("-inf")
    base = tl.where(nothing, 0.0, m)
    s_sum = tl.where(nothing, 1.0, tl.sum(s, axis=0))
    u_over_s = tl.sum(u, axis=0) / s_sum
    tl.store(entropy_ptr + row, tl.log(s_sum) - u_over_s)

    if WRITE_GRAD:
        grad_ptr += row * stride_gt
        row_scale = tl.load(row_scale_ptr + row)
        # 0, and not NaN, where row_scale is 0 and the row holds NaN.
        factor = tl.where(row_scale == 0, 0.0, -LOGIT_SCALE * row_scale / s_sum)
        # Backwards, so that what was read last, and is still in the cache, is read first.
        if whole < V:
            _store_grad(
                z_ptr, grad_ptr, whole + offs_v, V, base, u_over_s, factor,
                SOFTCAP, LOGIT_SCALE, True,
            )  # fmt: skip
        for done in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
            _store_grad(
                z_ptr, grad_ptr, whole - BLOCK_V - done + offs_v, V, base, u_over_s, factor,
                SOFTCAP, LOGIT_SCALE, False,
            )  # fmt: skip


def _rows_triton(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, softcap: float | None,
    logit_scale: float,
) -> Tensor:  # fmt: skip
    entropy = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _softmax_entropy_kernel[(logits.shape[0],)](
        logits,
        grad,
        row_scale,
        entropy,
        logits.stride(0),
        0 if grad is None else grad.stride(0),
        logits.shape[1],
        SOFTCAP=softcap,
        LOGIT_SCALE=logit_scale,
        WRITE_GRAD=grad is not None,
        **configuration(_CONFIGS, logits.device),
    )
    return entropy


def _rows_torch(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, softcap: float | None,
    logit_scale: float,
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(logits.dtype, torch.float32)
    entropy = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    rows = max(1, _BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        z, slope = logits[block], None
        if logit_scale != 1:
            z = z.to(dtype) * logit_scale
        if softcap is not None:
            tanh = (z.to(dtype) / softcap).tanh_()
            slope = tanh.square().neg_().add_(1)
            z = tanh.mul_(softcap).masked_fill_(z == -torch.inf, -torch.inf)
        base = z.amax(dim=1, keepdim=True).to(dtype)
        # A row of only -inf would make -inf - -inf; with 0 in its place every exp is 0 below.
        d = z - base.masked_fill_(base == -torch.inf, 0)
        e = d.exp()
        # At least 1, the maximum's own term, but for a row of only -inf.
        s = e.sum(dim=1, keepdim=True).clamp_(min=1)
        # The smallest finite number for -inf, so that d · exp(d) is 0 where exp(d) is.
        d.clamp_(min=torch.finfo(dtype).min)
        u_over_s = torch.linalg.vecdot(e, d).unsqueeze(1) / s
        entropy[block] = (s.log() - u_over_s).squeeze(1)
        if grad is not None and row_scale is not None:
            scale = row_scale[block, None]
            e *= -logit_scale * scale / s
            if slope is not None:
                e *= slope
            grad[block] = e.mul_(d.sub_(u_over_s)).masked_fill_(scale == 0, 0)
    return entropy


def entropy_rows(
    logits: Tensor,
    row_scale: Tensor | None = None,
    grad: Tensor | None = None,
    *,
    softcap: float | None,
    logit_scale: float,
    backend: str | None,
) -> Tensor:
    """Return H of each row; with row_scale, write row_scale · dH/dlogits to grad (may be logits).

    For the operations of this package: arguments are not checked, grad may be of another dtype.
    """
    rows = _rows_triton if resolve_backend(backend, logits) == "triton" else _rows_torch
    maths_dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[0], dtype=maths_dtype)
    if row_scale is not None:
        row_scale = row_scale.to(maths_dtype).contiguous()
    with undisturbed(logits):
        return rows(logits, row_scale, grad, softcap, logit_scale)


@torch.library.custom_op("hfprune_fast::softmax_entropy", mutates_args=())
def _softmax_entropy(
    logits: Tensor, softcap: float | None, logit_scale: float, backend: str | None
) -> Tensor:
    _check(logits, None, softcap, logit_scale)
    return entropy_rows(logits, softcap=softcap, logit_scale=logit_scale, backend=backend)


@torch.library.custom_op("hfprune_fast::softmax_entropy_backward", mutates_args=())
def _softmax_entropy_backward(
    logits: Tensor, d_entropy: Tensor, softcap: float | None, logit_scale: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    grad = torch.empty_like(logits)
    entropy_rows(
        logits, d_entropy, grad,
        softcap=softcap, logit_scale=logit_scale, backend=backend,
    )  # fmt: skip
    return grad


@torch.library.custom_op("hfprune_fast::softmax_entropy_grad_", mutates_args=("logits",))
def _softmax_entropy_grad_(
    logits: Tensor, row_scale: Tensor, softcap: float | None, logit_scale: float,
    backend: str | None,
) -> Tensor:  # fmt: skip
    _check(logits, row_scale, softcap, logit_scale)
    return entropy_rows(
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
        backend: "triton" or "torch"; by default what HFPRUNE_BACKEND says, else triton on a GPU and
            torch elsewhere and for fp64.

    Returns:
        H: (T,) in nats; fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: arguments of another shape, dtype or stride, or a backend that cannot run.
        RuntimeError: a second derivative is asked for.

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

    dH/dz_i = -p_i (log p_i + H), at the logits given, through softcap and logit_scale.

    Args:
        logits: as in `softmax_entropy`; overwritten.
        row_scale: (T,) factor of each row's gradient, for example 1 / sequence length. Where it is
            0 the gradient is exactly 0, whatever the logits.
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
    return _softmax_entropy_grad_(
        logits.detach(), row_scale.detach(), softcap, logit_scale, backend
    )


def _check(
    logits: Tensor, row_scale: Tensor | None, softcap: float | None, logit_scale: float
) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a (T, V) float tensor, got {tuple(logits.shape)} {logits.dtype}"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits must have unit stride along V, got strides {logits.stride()}")
    if row_scale is not None and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"rows of logits must not overlap to be overwritten, got strides {logits.stride()}"
        )
    if row_scale is not None and row_scale.shape != logits.shape[:1]:
        raise ValueError(
            f"row_scale must be ({logits.shape[0]},), one factor a row, "
            f"got {tuple(row_scale.shape)}"
        )
    check_devices(logits, row_scale=row_scale)
    check_transform(softcap, logit_scale)
