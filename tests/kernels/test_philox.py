"""The generator gives the words that its authors publish, and both paths the same numbers."""

import pytest
import torch
from paths import needs_triton

from hfprune_fast.kernels._philox import philox, uniform, uniform_fp32
from hfprune_fast.kernels._triton import jit, tl

IDS = torch.tensor([0, 1, 2, 3 << 20, (1 << 32) - 1, 1 << 32, (1 << 40) + 7, (1 << 63) - 1, -5])
SEEDS = [0, 1, 16, 123_456_789, (1 << 32) + 1, (1 << 63) - 1]


@jit
def _uniform_kernel(id_ptr, u_ptr, seed):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    tl.store(u_ptr + row, uniform_fp32(tl.load(id_ptr + row), seed))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # of Philox 4x32-10, from Random123's known answers
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)  # fmt: skip
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox(tuple(torch.tensor([word]) for word in counter), (key[0], key[1]))
    assert [int(word) for word in words] == expected


@needs_triton
@pytest.mark.parametrize("seed", SEEDS[3:])
def test_both_paths_draw_the_same_bits(seed: int) -> None:
    in_triton = torch.empty(len(IDS))
    _uniform_kernel[(len(IDS),)](IDS, in_triton, seed)
    assert torch.equal(in_triton, uniform(IDS, seed, torch.float32))


def test_numbers_are_inside_0_and_1_and_alike_in_both_dtypes() -> None:
    ids = torch.arange(1 << 16)
    single, double = (uniform(ids, 3, dtype) for dtype in (torch.float32, torch.float64))
    for numbers in (single, double):
        assert (numbers > 0).all()
        assert (numbers < 1).all()
    assert (single - double).abs().max() <= 2.0**-24  # half a step of the coarser one
    # The mean of N uniform numbers has the standard deviation 1 / √(12 N).
    assert abs(float(double.mean()) - 0.5) < 5 / (12 * len(ids)) ** 0.5


def test_seeds_and_ids_all_matter() -> None:
    numbers = torch.cat([uniform(IDS, seed, torch.float64) for seed in SEEDS])
    assert len(numbers.unique()) == len(SEEDS) * len(IDS)
