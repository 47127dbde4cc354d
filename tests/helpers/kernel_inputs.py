"""Inputs of the kernels' tests, some of which hurt a kernel that sums over tokens."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "slice of columns": lambda t: torch.cat((t, t, t), dim=2)[..., t.shape[2] : 2 * t.shape[2]],
    "every second column": lambda t: t.repeat_interleave(2, dim=2)[..., ::2],
    "slice of tokens": lambda t: torch.cat((t, t), dim=1)[:, t.shape[1] :],
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "neurons first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


def token_mask(lengths: list[int], seq_len: int, side: str) -> Tensor:
    """(B, S) bool of sequences padded to seq_len on one side."""
    position = torch.arange(seq_len) if side == "right" else torch.arange(seq_len).flip(0)
    return position < torch.tensor(lengths)[:, None]


def random(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def normal(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits with the spread of a usual model's."""
    return random(rows, vocab, dtype=dtype, seed=rows + vocab, scale=3)


def integers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Whole numbers of size 3 at most: sums of their products and squares are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def dyadic(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and bias whose logits are exact in every dtype, in any order of summation.

    Multiples of 1/16 of size at most width + 1 <= 16: 8 bits.
    """
    generator = torch.Generator().manual_seed(seed)

    def multiples(step: float, *shape: int) -> Tensor:
        most = round(1 / step)
        return (step * torch.randint(-most, most + 1, shape, generator=generator)).to(dtype)

    return multiples(1 / 2, tokens, width), multiples(1 / 8, vocab, width), multiples(1 / 16, vocab)


def sparse_memory(folder: Path) -> Tensor:
    """2^32 + 64 bfloat16 zeros in a file; they take no memory or disk until they are written to."""
    path = str(folder / "sparse")
    return torch.from_file(path, shared=True, size=2**32 + 64, dtype=torch.bfloat16)
