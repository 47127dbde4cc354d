"""One uniform number per row, by its id: independent of the order and of other draws.

Philox 4x32-10, a counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as
easy as 1, 2, 3", 2011). The id of the row is the counter, the seed is the key: ten rounds of

    c0, c1, c2, c3 ← hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0)
    k0, k1 ← k0 + 0x9E3779B9, k1 + 0xBB67AE85

in words of 32 bits. The kernel uses Triton's own, the torch path the one below, with the same bits.
The upper bits choose one of 2^23 equal steps (2^52 for fp64) and u is its middle, so that u is
neither 0 nor 1.
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
    """Return the upper and lower word of a 32 x 32 bit product, by halves that fit in int64."""
    low, high = (word & 0xFFFF) * factor, (word >> 16) * factor
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def uniform(row_id: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Return u in (0, 1) for each int64 id; fp32 and fp64 agree to 2^-23."""
    zero = torch.zeros_like(row_id)
    counter = (row_id & _WORD, row_id >> 32 & _WORD, zero, zero)
    first, second, _, _ = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    if dtype == torch.float64:
        return (((first << 20) + (second >> 12)).to(dtype) + 0.5) * 2.0**-52
    return ((first >> 9).to(dtype) + 0.5) * 2.0**-23


@jit
def uniform_fp32(row_id, seed):
    """Return u of one row, with the bits of `uniform` in fp32."""
    low, high = row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)
    first, _, _, _ = tl.philox(seed, low, high, tl.zeros_like(low), tl.zeros_like(low))
    # A number below 2^23 plus a half is exact in fp32.
    return ((first >> 9).to(tl.float32) + 0.5) * (1 / (1 << 23))
