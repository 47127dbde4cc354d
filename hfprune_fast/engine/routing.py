"""Which tokens go to which expert, and what that says of the experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_fast.models.experts import ExpertsMLP


@dataclass(frozen=True)
class Rows:
    """The rows of one expert: those tokens that chose it, in their order."""

    expert: int
    tokens: Tensor  # (n,) int64
    choices: Tensor  # (n,) int64: which of a token's k choices it is
    of_sequence: list[int]  # how many are of each sequence

    def padded(self, rows: Tensor) -> Tensor:
        """Return (n, F) rows as (B, the most of a sequence, F), the rest 0."""
        if len(self.of_sequence) == 1:
            return rows[None]
        return torch.nn.utils.rnn.pad_sequence(list(rows.split(self.of_sequence)), batch_first=True)

    def unpadded(self, rows: Tensor) -> Tensor:
        """Return what `padded` was given."""
        if len(self.of_sequence) == 1:
            return rows[0]
        return torch.cat([of[:n] for of, n in zip(rows, self.of_sequence, strict=True)])


def routed_rows(
    chosen: Tensor, count: int, token_mask: Tensor | None, sequences: int
) -> list[Rows]:
    """Return the rows of each expert that has any, from the experts (T, k) that tokens chose."""
    flat, k = chosen.flatten(), chosen.shape[1]
    if token_mask is not None:
        flat = torch.where(token_mask.flatten().repeat_interleave(k), flat, count)
    order = flat.argsort(stable=True)
    tokens = order // k
    sequence = tokens // max(1, len(chosen) // sequences)
    of_both = torch.bincount(flat[order] * sequences + sequence, minlength=(count + 1) * sequences)
    numbers = of_both[: count * sequences].view(count, sequences).tolist()  # waits for the device
    found, begin = [], 0
    for expert, of_sequence in enumerate(numbers):
        part = slice(begin, begin + sum(of_sequence))
        begin = part.stop
        if part.stop > part.start:
            found.append(Rows(expert, tokens[part], order[part] % k, of_sequence))
    return found


@dataclass
class Routing:
    """What routing says of a layer's experts, of one micro-batch; (E,) float64 each."""

    output_norms: Tensor  # Σ w·‖y‖
    tokens: Tensor
    weights: Tensor  # Σ w

    @classmethod
    def of(cls, experts: ExpertsMLP) -> Routing:
        device = experts.module.down_proj.device
        return cls(*torch.zeros(3, experts.count, dtype=torch.float64, device=device))

    def add(self, rows: Rows, weights: Tensor, outputs: Tensor) -> None:
        wide = weights.double()
        norms = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).norm(dim=-1)
        self.output_norms[rows.expert] += (wide * norms.double()).sum()
        self.tokens[rows.expert] += len(weights)
        self.weights[rows.expert] += wide.sum()
