"""The passes in C++ for a CPU (csrc/): tensors are checked and handed over by address.

The extension is optional. HFPRUNE_NATIVE=0 turns it off for a whole run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.kernels._activations import Gated
from hfprune_fast.kernels._criterion import Criterion
from hfprune_fast.kernels._philox import uniform

_C: Any = None
CPP_UNUSED_REASON: str | None = None  # why the extension is not used, or None
try:
    from hfprune_fast import _C
except ImportError as error:
    CPP_UNUSED_REASON = str(error)
if os.environ.get("HFPRUNE_NATIVE") == "0":
    _C, CPP_UNUSED_REASON = None, "HFPRUNE_NATIVE=0"

# What the CPU can run, best first: of "avx512", "avx2" and "portable".
CPP_INSTRUCTIONS: tuple[str, ...] = () if _C is None else tuple(_C.kernel_instructions())
_chosen = CPP_INSTRUCTIONS[:1]


def rows_cpp(
    logits: Tensor, row_scale: Tensor | None, grad: Tensor | None, criterion: Criterion,
    softcap: float | None, logit_scale: float,
) -> Tensor:  # fmt: skip
    """Run the row pass of `_rows.py`; values are fp32."""
    keys = criterion.keys
    if keys is not None and criterion.name == "fisher":
        keys = uniform(keys, criterion.seed, torch.float32)
    values = torch.empty(logits.shape[0], dtype=torch.float32)
    _C.row_pass(
        _rows(logits),
        rows=logits.shape[0],
        columns=logits.shape[1],
        values=values.data_ptr(),
        grad=None if grad is None else _rows(grad),
        row_scale=_address(row_scale),
        keys=_address(keys),
        criterion=criterion.name,
        alpha=criterion.alpha,
        temperature=criterion.temperature,
        transform=(softcap, logit_scale),
        **_run_options(),
    )
    return values


def kl_rows_cpp(
    logits: Tensor, teacher_logits: Tensor, row_scale: Tensor, grad: Tensor,
    transform: tuple[float | None, float], teacher_transform: tuple[float | None, float],
) -> Tensor:  # fmt: skip
    """Run the pass of `_kl_rows.py`; values are fp32."""
    values = torch.empty(logits.shape[0], dtype=torch.float32)
    _C.kl_pass(
        _rows(logits),
        _rows(teacher_logits),
        rows=logits.shape[0],
        columns=logits.shape[1],
        values=values.data_ptr(),
        grad=_rows(grad),
        row_scale=_address(row_scale),
        transform=transform,
        teacher_transform=teacher_transform,
        **_run_options(),
    )
    return values


def statistics_cpp(grad: Tensor, act: Tensor | Gated, token_mask: Tensor | None) -> Tensor:
    """Return the (4, F) fp64 sums of `_statistics.py` and write the gradients of a Gated."""
    batch, seq_len, width = grad.shape
    sums = torch.empty(4, width, dtype=torch.float64)
    inputs = {"grad": grad, "gate": act} if isinstance(act, Tensor) else {"grad": grad}
    outputs = {}
    if isinstance(act, Gated):
        inputs |= {"gate": act.gate, "up": act.up}
        outputs = {"d_gate": act.d_gate, "d_up": act.d_up}
    # Copies of what has another stride along F live until the pass is done.
    read = {name: _unit_stride(tensor) for name, tensor in inputs.items()}
    is_token = None if token_mask is None else token_mask.contiguous().view(torch.uint8)
    _C.taylor_pass(
        _dtype(grad),
        sequences=batch,
        tokens=seq_len,
        width=width,
        activation=act.activation if isinstance(act, Gated) else "none",
        **{name: (t.data_ptr(), *t.stride()[:2]) for name, t in (read | outputs).items()},
        is_token=_address(is_token),
        sums=sums.data_ptr(),
        **_run_options(),
    )
    return sums


def _run_options() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "instructions": _chosen[0]}


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> tuple[int, int, str]:
    """Return (T, V) of unit stride along V as address, stride of rows and dtype."""
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"rows must have unit stride along V, got strides {tensor.stride()}")
    return tensor.data_ptr(), tensor.stride(0), _dtype(tensor)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    """Return the address of a contiguous tensor; 0 for None."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.data_ptr()
