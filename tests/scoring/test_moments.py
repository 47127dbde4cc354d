"""Second moments, of which only the blocks on and above the diagonal are multiplied."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hfprune_fast.scoring.moments import add_gram, has_exact_products, mirror, product

ROWS, EPS = 19, torch.finfo(torch.float32).eps


@pytest.mark.parametrize("are_weighted", [False, True])
@pytest.mark.parametrize("width", [1, 2, 127, 128, 129, 300, 1100])
def test_a_gram_matrix_is_the_whole_product(width: int, are_weighted: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    gram = torch.zeros(width, width, dtype=torch.float64)
    expected, sizes = torch.zeros_like(gram), torch.zeros_like(gram)
    for _ in range(2):
        rows = torch.randn(width, ROWS, generator=generator).t()  # strided
        weights = torch.rand(ROWS, 1, generator=generator)
        weighted = rows * weights if are_weighted else None
        add_gram(gram, rows, weighted)
        left = (rows if weighted is None else weighted).double().t()
        expected += left @ rows.double()
        sizes += left.abs() @ rows.abs().double()
    # A rounding of each product and sum, and where there are weights of each weighted row.
    allowed = (ROWS + 2) * EPS * sizes
    assert bool(((mirror(gram) - expected).abs() <= allowed).all())


@pytest.mark.parametrize(("width", "part"), [(384, 2 / 3), (1024, 9 / 16), (4096, 9 / 16)])
def test_little_more_than_half_of_the_products_are_made(width: int, part: float) -> None:
    gram, rows = (torch.empty(n, width, device="meta") for n in (width, ROWS))
    with FlopCounterMode(display=False) as flops:
        add_gram(gram, rows)
    assert flops.get_total_flops() == pytest.approx(part * 2 * ROWS * width**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_multiplies_halves_as_they_are_and_adds_in_fp32(dtype: torch.dtype) -> None:
    with FakeTensorMode():  # which needs no GPU
        rows = torch.empty(ROWS, 256, dtype=dtype, device="cuda")
        assert has_exact_products(rows)
        assert product(rows, rows).dtype == torch.float32
    assert not has_exact_products(torch.empty(ROWS, 256, dtype=dtype))
