"""Second moments, of which only the blocks on and above the diagonal are multiplied."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.scoring import moments
from hfprune_fast.scoring.moments import (
    OutputCovariance,
    add_gram,
    has_exact_products,
    mirror,
    product,
)

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


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 2, 5)])
def test_a_covariance_weighs_tokens_by_the_length_of_their_sequence(
    lengths: tuple[int, ...],
) -> None:
    grad = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    grad = grad * mask[..., None]
    batch = MicroBatch(torch.zeros(3, 6, dtype=torch.int64), lengths)
    total = OutputCovariance(40, torch.float32, grad.device)
    for _ in range(2):
        total.add(batch, 4.0, grad.flatten(0, 1))
    weighted = grad.double() * (torch.tensor(lengths) / 4.0)[:, None, None]
    flat = weighted.flatten(0, 1)
    sizes = 2 * flat.abs().t() @ flat.abs()
    error = (total.total() - 2 * flat.t() @ flat).abs()
    assert bool((error <= (2 * 18 + 3) * EPS * sizes).all())


@pytest.mark.parametrize("lengths", [(6, 6), (6, 2)])
def test_a_covariance_on_a_gpu_is_of_gradients_as_they_are(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied: list[torch.dtype] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        multiplied.extend((left.dtype, right.dtype))
        return product(left.float(), right.float())

    monkeypatch.setattr(moments, "has_exact_products", lambda rows: rows.dtype == torch.bfloat16)
    monkeypatch.setattr(moments, "product", counted)
    grad = torch.zeros(12, 256, dtype=torch.bfloat16)
    batch = MicroBatch(torch.zeros(2, 6, dtype=torch.int64), lengths)
    OutputCovariance(256, torch.bfloat16, grad.device).add(batch, 1.0, grad)
    assert set(multiplied) == {torch.bfloat16}
