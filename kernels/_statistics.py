"""The sums that `taylor_statistics` and `gated_taylor` share; the equations are in `taylor.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._activations import Gated, check_activation, eager_gated, value_and_slope
from hfprune_fast.kernels._arguments import check_devices, check_grad_scale
from hfprune_fast.kernels._cpp import statistics_cpp
from hfprune_fast.kernels._dispatch import choose, device_guard
from hfprune_fast.kernels._statistics_triton import statistics_triton

# Tokens of a block on the torch path.
_BLOCK_T = 128


def statistics_torch(grad: Tensor, act: Tensor | Gated, token_mask: Tensor | None) -> Tensor:
    """Compute the (4, F) fp64 sums by plain torch and write the gradients of a Gated."""
    batch, seq_len, width = grad.shape
    total = grad.new_zeros(4, width, dtype=torch.float64)
    for b in range(batch):
        x_sum = torch.zeros_like(total[0])
        for start in range(0, seq_len, _BLOCK_T):
            block = b, slice(start, start + _BLOCK_T)
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
            if isinstance(act, Gated):  # after the last use of the inputs, which they may overwrite
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
    if gated is not None:  # after the last use of grad, which they may overwrite
        gated.d_gate.copy_(gradients[0])
        gated.d_up.copy_(gradients[1])
    return total


IMPLEMENTATIONS = {"triton": statistics_triton, "cpp": statistics_cpp, "torch": statistics_torch}


def taylor_sums(
    grad: Tensor,
    act: Tensor | Gated,
    *,
    token_mask: Tensor | None,
    parity: bool,
    grad_scale: float,
    backend: str | None,
) -> Tensor:
    """Return the (4, F) sums of l1, l2, fisher_mask and act, free of grad_scale.

    grad is (B, S, F); act is the same, or a Gated whose gradients are then written.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run.
    """
    _check(grad, act, token_mask, grad_scale)
    if parity and (backend in ("triton", "cpp") or token_mask is not None or grad_scale != 1):
        raise ValueError(
            "parity=True is plain torch over whole sequences: no other backend, token_mask or "
            "grad_scale"
        )
    # Parity is torch whatever the environment says.
    statistics = choose(IMPLEMENTATIONS, "torch" if parity and backend is None else backend, grad)
    if grad.numel() == 0:
        return grad.new_zeros(4, grad.shape[2], dtype=sum_dtype(grad, parity))
    with device_guard(grad):
        if parity:
            return _statistics_parity(grad, act)
        total = statistics(grad, act, token_mask)
    if grad_scale != 1:
        total[0] /= grad_scale
        total[1:3] /= grad_scale**2
    return total


def sum_dtype(grad: Tensor, parity: bool) -> torch.dtype:
    """Return the dtype of the sums: fp64, or with parity that of grad."""
    return grad.dtype if parity else torch.float64


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
                "d_gate and d_up (gate and up with overwrite=True, else out) must have unit "
                f"stride along F and one stride over B and S, got {tensor.stride()}"
            )
    if isinstance(act, Gated):
        _check_memory(grad, act)
    if token_mask is not None and (
        token_mask.shape != grad.shape[:2] or token_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"token_mask must be {tuple(grad.shape[:2])} bool, "
            f"got {tuple(token_mask.shape)} {token_mask.dtype}"
        )
    check_devices(grad, token_mask=token_mask)
    check_grad_scale(grad_scale)


def _check_memory(grad: Tensor, act: Gated) -> None:
    """Raise ValueError if a gradient would be written over what is still to be read or kept."""
    if act.d_gate.data_ptr() == act.d_up.data_ptr() != 0 or _crosses(act.d_gate, act.d_up):
        raise ValueError("the gradients at gate and up would be written to the same tensor")
    for output, tensor in (("d_gate", act.d_gate), ("d_up", act.d_up)):
        for name, source in (("grad", grad), ("gate", act.gate), ("up", act.up)):
            if _crosses(tensor, source):
                raise ValueError(
                    f"{output} must be {name} itself or lie apart from it, got a part of its memory"
                )


def _crosses(one: Tensor, other: Tensor) -> bool:
    """Return whether an element of one is in the memory of another element of the other."""
    starts = one.data_ptr(), other.data_ptr()
    same = starts[0] == starts[1] and one.stride() == other.stride()
    if one.numel() == 0 or 0 in starts or same:  # 0: without memory
        return False
    size = one.element_size()
    ends = [
        start
        + size * (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)))
        for start, t in zip(starts, (one, other), strict=True)
    ]
    if ends[0] <= starts[1] or ends[1] <= starts[0]:
        return False
    # Rows of one stride, as the halves of a fused tensor: apart if their columns are.
    (batch, seq_len, width), stride = one.shape, one.stride(0 if one.shape[1] == 1 else 1)
    rows = one.stride() == other.stride() and _is_rows(one) and batch * seq_len > 1
    shift, odd_bytes = divmod(starts[1] - starts[0], size)
    return not rows or odd_bytes != 0 or not width <= shift % stride <= stride - width


def _is_rows(tensor: Tensor) -> bool:
    """Return whether (B, S, F) is B·S rows of unit stride that do not overlap."""
    (batch, seq_len, width), (stride_b, stride_t, stride_f) = tensor.shape, tensor.stride()
    if seq_len == 1:
        stride_t = stride_b
    one_stride = batch == 1 or seq_len == 1 or stride_b == seq_len * stride_t
    apart = stride_t >= width or batch * seq_len == 1
    return tensor.numel() == 0 or (one_stride and apart and (stride_f == 1 or width == 1))
