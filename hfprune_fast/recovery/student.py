"""The pruned model as a student: its decoder, what of it is trained, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.engine.layerwise import Head
from hfprune_fast.models.sites import ModelParts
from hfprune_fast.recovery.loss import RecoveryLoss

Resident = Callable[[Tensor], Tensor]  # ids (B, T) -> the dense model's states (B, T, D)


class Student(nn.Module):
    """A model whose forward returns the loss of a batch of windows.

    Args:
        model: a causal language model, perhaps with adapters in it.
        parts: of it.
        loss: what it is trained by.
        head: its head, where that is not trained.
        resident: the dense model, where it runs beside this one.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: ModelParts,
        loss: RecoveryLoss,
        head: Head | None = None,
        resident: Resident | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._parts, self._loss, self._frozen_head, self._resident = parts, loss, head, resident

    def forward(self, ids: Tensor, states: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"loss": scalar} of windows (B, T) and the dense model's states (B, T, D)."""
        if self._loss.needs_teacher:
            states = self._of_teacher(ids, states)
        hidden, head = self._hidden(ids), self._head()
        with _no_autocast(ids):
            return {"loss": self._loss(hidden, head, states, ids)}

    @torch.no_grad()
    def held_out(self, ids: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean KL from the dense model over windows (B, T), and the loss, in nats."""
        states = self._of_teacher(ids, states)
        hidden, head = self._hidden(ids), self._head()
        with _no_autocast(ids):
            return self._loss.held_out(hidden, head, states, ids)

    def _of_teacher(self, ids: Tensor, states: Tensor | None) -> Tensor:
        if states is None:
            assert self._resident is not None
            with _no_autocast(ids):  # as a cached one has run
                states = self._resident(ids)
        return states

    def _hidden(self, ids: Tensor) -> Tensor:
        # Casts of weights are kept until the outermost autocast ends, here `own_modes`, the run's.
        torch.clear_autocast_cache()
        return final_hidden(self._parts, ids)

    def _head(self) -> Head:
        if self._frozen_head is not None:
            return self._frozen_head
        head = self._parts.head
        return Head(head.weight, head.bias, self._parts.logits)


def _no_autocast(ids: Tensor) -> torch.autocast:
    """Return a context where products are in the dtype of what they are made of."""
    return torch.autocast(ids.device.type, enabled=False)


def final_hidden(parts: ModelParts, ids: Tensor) -> Tensor:
    """Return the head's input (B, T, D) as the decoder computes it, all layers in one forward."""
    output: Any = parts.decoder(input_ids=ids, use_cache=False, return_dict=True)
    hidden: Tensor = output[0]
    return hidden
