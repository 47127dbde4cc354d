"""One uniform number a row, by its id: the same whatever else is drawn, in whatever order.

Philox 4x32-10, a counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as
easy as 1, 2, 3", 2011). The id of the row is the counter, the seed is the key: ten rounds of

    c0, c1, c2, c3 ← hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0)
    k0, k1 ← k0 + 0x9E3779B9, k1 + 0xBB67AE85

in words of 32 bits. The kernel's is Triton's own, the torch path's is below, and both give the same
bits. Of these the upper ones make u, in the middle of one of 2^23 equal steps (2^52 for fp64), so
that u is neither 0 nor 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_fast.kernels._triton import jit, tl

_A, _B = 0xD2511F53, 0xCD9E8D57
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four words for a counter of four, each an int64 tensor of numbers below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high_b, low_b), (high_a, low_a) = _product(_B, c2), _product(_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower word, by halves of 16 bits that int64 has room for."""
    low, high = (word & 0xFFFF) * factor, (word >> 16) * factor
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def uniform(row_id: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Return u in (0, 1) for each int64 id; that of fp32 is that of fp64 to 2^-23."""
    zero = torch.zeros_like(row_id)
    counter = (row_id & _WORD, row_id >> 32 & _WORD, zero, zero)
    first, second, _, _ = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    if dtype == torch.float64:
        return (((first << 20) + (second >> 12)).to(dtype) + 0.5) * 2.0**-52
    return ((first >> 9).to(dtype) + 0.5) * 2.0**-23


@jit
def uniform_fp32(row_id, seed):
    """u of one row, as `uniform` has it."""
    low, high = row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)
    first, _, _, _ = tl.philox(seed, low, high, tl.zeros_like(low), tl.zeros_like(low))
    # Below 2^23, with the half that is added: exact in fp32.
    return ((first >> 9).to(tl.float32) + 0.5) * (1 / (1 << 23))
