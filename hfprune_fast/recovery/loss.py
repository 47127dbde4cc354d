"""What a student is trained by: KL from the dense model's output, cross entropy, or their sum.

    KL = 1/T Σ_t Σ_i p_ti (log p_ti - log q_ti)        p dense, q student, in nats

Both heads' logits are made a chunk of rows at a time, and never held whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hfprune_fast.engine.layerwise import Head

_MIN_CHUNK_ROWS = 16


def linear_kl_loss(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    row_weight: Tensor | None = None, *,
    bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    softcap: float | None = None, teacher_softcap: float | None = None,
    logit_scale: float = 1.0, teacher_logit_scale: float = 1.0,
    logits_budget_bytes: int | None = None,
) -> Tensor:  # fmt: skip
    from hfprune_fast.models.sites import Logits

    student = Logits(logit_scale, softcap)
    teacher = Logits(teacher_logit_scale, teacher_softcap)
    rows = max(_MIN_CHUNK_ROWS, (logits_budget_bytes or 64 << 20) // (16 * len(weight)))

    def part(h: Tensor, w: Tensor, b: Tensor | None, th: Tensor) -> Tensor:
        p = teacher(torch.nn.functional.linear(th, teacher_weight, teacher_bias)).float()
        q = student(torch.nn.functional.linear(h, w, b)).float()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        total = total + checkpoint(  # type: ignore[no-untyped-call]
            part, hidden[chunk], weight, bias, teacher_hidden[chunk], use_reentrant=False
        )
    return total / len(hidden)


@dataclass(frozen=True)
class RecoveryLoss:
    """The loss of a batch of windows.

    Args:
        kind: "kl", "ce" or "kl+ce".
        teacher: the dense model's head, in the dtype that logits are made in.
        budget_bytes: of the logits; None is the kernels' default.
    """

    kind: str
    teacher: Head
    budget_bytes: int | None = None

    @property
    def needs_teacher(self) -> bool:
        return "kl" in self.kind

    def __call__(
        self, hidden: Tensor, student: Head, teacher_hidden: Tensor | None, ids: Tensor
    ) -> Tensor:
        """Return the loss, a scalar, differentiable in hidden and the student's head.

        Args:
            hidden: (B, T, D) the student's head's input.
            teacher_hidden: (B, T, D) the dense model's; not needed for ce.
            ids: (B, T) the windows.
        """
        parts = []
        if teacher_hidden is not None and self.needs_teacher:
            parts.append(self.kl(hidden, student, teacher_hidden))
        if "ce" in self.kind:
            dtype = self.teacher.weight.dtype
            parts.append(cross_entropy(hidden.to(dtype), student, ids, self.budget_bytes))
        return torch.stack(parts).sum()

    def kl(self, hidden: Tensor, student: Head, teacher_hidden: Tensor) -> Tensor:
        """Return the mean KL from the dense model over all positions, a scalar in nats."""
        teacher = self.teacher
        dtype = teacher.weight.dtype
        return linear_kl_loss(
            hidden.flatten(0, 1).to(dtype),
            student.weight.to(dtype),
            teacher_hidden.flatten(0, 1).to(dtype),
            teacher.weight,
            bias=None if student.bias is None else student.bias.to(dtype),
            teacher_bias=teacher.bias,
            softcap=student.logits.softcap,
            teacher_softcap=teacher.logits.softcap,
            logit_scale=student.logits.scale,
            teacher_logit_scale=teacher.logits.scale,
            logits_budget_bytes=self.budget_bytes,
        )


def cross_entropy(
    hidden: Tensor, head: Head, ids: Tensor, budget_bytes: int | None = None
) -> Tensor:
    """Return the mean cross entropy of the next token over T - 1 positions a window, in nats.

    The logits of a chunk are computed again in the backward pass.
    """
    states, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    weight = head.weight.to(hidden.dtype)
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    rows = max(_MIN_CHUNK_ROWS, (budget_bytes or 256 << 20) // (16 * len(head.weight)))

    def part(h: Tensor, weight: Tensor, bias: Tensor | None, at: Tensor) -> Tensor:
        logits = Head(weight, bias, head.logits)(h).float()
        return torch.nn.functional.cross_entropy(logits, at, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=states.device)
    for start in range(0, len(states), rows):
        chunk = slice(start, start + rows)
        total = total + checkpoint(  # type: ignore[no-untyped-call]
            part, states[chunk], weight, bias, labels[chunk], use_reentrant=False
        )
    return total / len(states)
