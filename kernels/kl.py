"""KL divergence of softmax(logits) from a teacher's, row by row, and its gradient.

The equations are in `linear_kl.py`, which makes the logits too, and the pass over the rows in
`_kl_rows.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._arguments import (
    check_devices,
    check_float64,
    check_logits,
    check_overwritten_logits,
    check_own_memory,
    check_transform,
)
from hfprune_fast.kernels._dispatch import resolve_backend
from hfprune_fast.kernels._kl_rows import kl_rows_and_grad
from hfprune_fast.kernels._operation import operation


@operation("softmax_kl_grad_", mutates_args=("logits",))
def _softmax_kl_grad_(
    logits: Tensor, teacher_logits: Tensor, row_scale: Tensor,
    softcap: float | None, teacher_softcap: float | None,
    logit_scale: float, teacher_logit_scale: float, backend: str | None,
) -> Tensor:  # fmt: skip
    check_overwritten_logits(logits, row_scale)
    _check_teacher(logits, teacher_logits)
    check_transform(softcap, logit_scale)
    check_transform(teacher_softcap, teacher_logit_scale, "teacher_")
    transforms = (softcap, logit_scale), (teacher_softcap, teacher_logit_scale)
    resolved = resolve_backend(backend, logits)
    return kl_rows_and_grad(logits, teacher_logits, row_scale, logits, *transforms, resolved)


@_softmax_kl_grad_.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


def softmax_kl_grad_(
    logits: Tensor,
    teacher_logits: Tensor,
    row_scale: Tensor,
    *,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Overwrite logits with row_scale · dKL/dlogits and return the KL from the teacher.

    KL = Σ_i p_i (log p_i - log q_i) and dKL/dz_i = q_i - p_i, with q = softmax(z) of the logits and
    p that of the teacher's (Hinton, Vinyals, Dean: "Distilling the knowledge in a neural network",
    2015), with respect to the logits before softcap and logit_scale.

    Args:
        logits: (T, V) bf16, fp16, fp32 or fp64; rows of any stride, unit stride along V;
            overwritten.
        teacher_logits: (T, V), in memory of its own; its dtype may be another one, but for fp64.
        row_scale: (T,) factor of each row's gradient, in memory of its own; where it is 0 the
            gradient is exactly 0.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale: as in `linear_entropy`, of each.
        backend: as in `softmax_entropy`.

    Returns:
        KL: (T,) in nats; fp32, or fp64 for fp64 logits. inf where the teacher allows an entry that
            the student masks by -inf, and 0 where the teacher's row is -inf throughout.

    Raises:
        ValueError: arguments of another shape, dtype or stride, or a backend that cannot run.

    Not differentiable (torch has no autograd for an operation that overwrites its input). Memory
    traffic on a GPU: two reads of both logits, the second ones in part from the L2 cache, and one
    write: 6 to 10 bytes an entry of the vocabulary in bf16.
    """
    return _softmax_kl_grad_(
        logits, teacher_logits, row_scale, softcap, teacher_softcap, logit_scale,
        teacher_logit_scale, backend,
    )  # fmt: skip


def _check_teacher(logits: Tensor, teacher_logits: Tensor) -> None:
    check_logits(teacher_logits, "teacher_logits")
    check_devices(logits, teacher_logits=teacher_logits)
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_logits must be {tuple(logits.shape)} as the logits are, "
            f"got {tuple(teacher_logits.shape)}"
        )
    check_float64(logits, teacher_logits, "logits")
    check_own_memory(logits, teacher_logits=teacher_logits)
