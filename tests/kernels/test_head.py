"""Chunks of a head's rows fill whole waves of a GPU's multiprocessors, within the budget."""

import math

import pytest

from hfprune_fast.kernels._head import wave_rows

MIB = 1 << 20


def waves(rows: int, vocab: int, width: int, multiprocessors: int) -> int:
    """Time of both products of a chunk: each wave of tiles sums over the inner size."""
    tiles = math.ceil(rows / 128)
    forward = math.ceil(tiles * math.ceil(vocab / 256) / multiprocessors) * width
    return forward + math.ceil(tiles * math.ceil(width / 256) / multiprocessors) * vocab


def time_of(tokens: int, rows: int, vocab: int, width: int, multiprocessors: int) -> int:
    chunks = [min(rows, tokens - start) for start in range(0, tokens, rows)]
    return sum(waves(chunk, vocab, width, multiprocessors) for chunk in chunks)


def share_of_the_least(tokens: int, rows: int, vocab: int, width: int) -> float:
    """Of the time with no tile idle, on 132 multiprocessors."""
    least = 2 * tokens / 128 * vocab / 256 * width / 132
    return least / time_of(tokens, rows, vocab, width, 132)


@pytest.mark.parametrize(
    ("vocab", "width", "tokens", "rows", "before"),
    [  # `before`: rows of a chunk by the budget alone, then 256 MiB
        (152_064, 3584, 16_384, 1152, 768),  # 9 · 14 = 126 tiles of 132, not 84
        (152_064, 3584, 8192, 1024, 768),  # 8 chunks alike, not 7 and a rest
        (151_936, 1024, 16_384, 1280, 768),  # 40 tiles: the budget allows no more
        (151_936, 2560, 16_384, 1280, 768),  # 100 tiles, not 60
        (151_936, 5120, 16_384, 768, 768),  # 120 tiles, and 1280 rows would have 200 of 264
        (128_256, 4096, 16_384, 1024, 1024),  # 128 tiles, as ever
        (128_256, 8192, 16_384, 1536, 1024),  # 384 tiles of 396
        (32_000, 4096, 16_384, 5248, 4096),
    ],
)
def test_rows_of_known_heads_on_132_multiprocessors(
    vocab: int, width: int, tokens: int, rows: int, before: int
) -> None:
    row_bytes = 2 * vocab
    most = max(384 * MIB, 512 * row_bytes) // row_bytes
    assert wave_rows(tokens, most, ((vocab, width), (width, vocab)), 132) == rows
    assert rows * row_bytes <= 384 * MIB
    now, then = (share_of_the_least(tokens, r, vocab, width) for r in (rows, before))
    assert then <= now <= 1
    if before < rows and vocab > 150_000:
        assert now > 1.15 * then


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000, 4096, 5000])
@pytest.mark.parametrize("most", [128, 300, 882, 4000])
@pytest.mark.parametrize("multiprocessors", [1, 84, 108, 132])
def test_no_other_chunk_takes_less_time(tokens: int, most: int, multiprocessors: int) -> None:
    vocab, width = 50_257, 768
    found = wave_rows(tokens, most, ((vocab, width), (width, vocab)), multiprocessors)
    assert found == tokens or found % 128 == 0
    assert found <= min(most, tokens) or found == 128 == most
    for rows in range(128, most + 1, 128):
        time = time_of(tokens, rows, vocab, width, multiprocessors)
        assert time_of(tokens, found, vocab, width, multiprocessors) <= time
