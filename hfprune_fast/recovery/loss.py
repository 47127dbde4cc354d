"""What a student is trained by: KL from the dense model's output, cross entropy, or their sum.

    KL = 1/T Σ_t Σ_i p_ti (log p_ti - log q_ti)        p dense, q student, in nats

Both heads' logits are made a chunk of rows at a time by the kernels, and never held whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.engine.layerwise import Head
from hfprune_fast.kernels import linear_cross_entropy_loss, linear_kl_loss


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
            parts.append(self._cross_entropy(hidden, student, ids))
        return torch.stack(parts).sum()

    def held_out(
        self, hidden: Tensor, student: Head, teacher_hidden: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return KL and the loss itself, scalars in nats, of what is measured and not trained on.

        Args are those of a call. KL is of logits in fp32.
        """
        kl = self.kl(hidden, student, teacher_hidden, fp32_logits=True)
        if self.kind == "kl":
            return kl, kl
        cross_entropy = self._cross_entropy(hidden, student, ids)
        return kl, cross_entropy if self.kind == "ce" else kl + cross_entropy

    def kl(
        self, hidden: Tensor, student: Head, teacher_hidden: Tensor, *, fp32_logits: bool = False
    ) -> Tensor:
        """Return the mean KL from the dense model over all positions, a scalar in nats."""
        teacher, (weight, bias) = self.teacher, self._in_dtype(student)
        return linear_kl_loss(
            hidden.flatten(0, 1).to(weight.dtype),
            weight,
            teacher_hidden.flatten(0, 1).to(weight.dtype),
            teacher.weight,
            bias=bias,
            teacher_bias=teacher.bias,
            softcap=student.logits.softcap,
            teacher_softcap=teacher.logits.softcap,
            logit_scale=student.logits.scale,
            teacher_logit_scale=teacher.logits.scale,
            fp32_logits=fp32_logits,
            logits_budget_bytes=self.budget_bytes,
        )

    def _cross_entropy(self, hidden: Tensor, student: Head, ids: Tensor) -> Tensor:
        """Return the mean cross entropy of the next token over T - 1 positions, in nats."""
        weight, bias = self._in_dtype(student)
        return linear_cross_entropy_loss(
            hidden[:, :-1].flatten(0, 1).to(weight.dtype),
            weight,
            ids[:, 1:].flatten(),
            bias=bias,
            logits_budget_bytes=self.budget_bytes,
            **student.logits.options,
        )

    def _in_dtype(self, head: Head) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in the dtype of the logits; trained ones are in float32."""
        dtype = self.teacher.weight.dtype
        return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
