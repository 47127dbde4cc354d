from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import dyadic, random
from paths import every_path
from rows_truth import assert_head, rows_truth
from tolerances import assert_no_worse, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from truth import entropy
from watch import Watch

from hfprune_fast.kernels import (
    linear_cross_entropy,
    linear_entropy,
    linear_entropy_reference,
    linear_fisher,
    softmax_entropy,
)

NAN = float("nan")
each_precision = pytest.mark.parametrize("fp32_logits", [False, True])


@every_path
@settings(deadline=None, max_examples=8)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 80)),
    has_bias=st.booleans(),
    transform=st.sampled_from(
        [{}, {"softcap": 8.0}, {"logit_scale": 0.25}, {"softcap": 5.0, "logit_scale": 2.0}]
    ),
    fp32_logits=st.booleans(),
    logits_budget_bytes=st.sampled_from([None, 1, 3000]),
    grad_scale=st.sampled_from([1.0, 1024.0]),
    padding=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_float64(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int], has_bias: bool,
    transform: dict[str, float], padding: bool, seed: int, **options: Any,
) -> None:  # fmt: skip
    hidden, weight, bias = dyadic(*sizes, dtype, seed)
    row_weight = torch.rand(sizes[0], generator=torch.Generator().manual_seed(seed)).double()
    row_weight[: sizes[0] // 2] *= not padding
    options["bias"] = bias if has_bias else None
    assert_head(linear_entropy, hidden, weight, row_weight, backend, **transform, **options)


@every_path
@each_precision
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (12, 1000)])
def test_no_worse_than_autograd(
    backend: str, dtype: torch.dtype, fp32_logits: bool, tokens: int, vocab: int
) -> None:
    # With inputs of full precision, so that the logits are rounded too.
    hidden = random(tokens, 32, dtype=dtype)
    weight = random(vocab, 32, dtype=dtype, seed=1, scale=0.25)
    row_weight = torch.rand(tokens, dtype=torch.float64)
    h = hidden.double().requires_grad_()
    true_loss = (entropy(h @ weight.double().T) * row_weight).sum()
    (true_grad,) = torch.autograd.grad(true_loss, h)
    eager_loss, eager_grad = linear_entropy_reference(hidden, weight, row_weight.to(dtype))
    loss, grad = linear_entropy(
        hidden, weight, row_weight, fp32_logits=fp32_logits, backend=backend
    )
    # dz and d_hidden are rounded once each. In float64 eager is the truth itself, and a sum of V
    # terms in another order moves by V eps at most.
    eps = torch.finfo(dtype).eps
    floor = (vocab if dtype == torch.float64 else 4) * eps
    assert_no_worse(loss[None], eager_loss[None], true_loss.detach()[None], floor=floor)
    assert_no_worse(grad.flatten(), eager_grad.flatten(), true_grad.flatten(), floor=floor)


@every_path
@each_precision
def test_padding_counts_for_nothing(backend: str, dtype: torch.dtype, fp32_logits: bool) -> None:
    hidden, weight, bias = dyadic(9, 12, 50, dtype)
    row_weight = torch.tensor([0.25, 0, 0, 0.5, 0, 1, 1, 0, 0])
    padding = row_weight == 0
    options: dict[str, Any] = {"bias": bias, "fp32_logits": fp32_logits, "backend": backend}
    clean_loss, clean = linear_entropy(hidden, weight, row_weight, **options)
    hidden[padding] = torch.tensor([NAN, torch.inf, -torch.inf, 6e4, NAN], dtype=dtype)[:, None]
    loss, d_hidden = linear_entropy(hidden, weight, row_weight, **options)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(d_hidden, clean)
    assert (d_hidden[padding] == 0).all()
    assert (d_hidden[~padding] != 0).any(dim=1).all()


def test_by_default_rows_weigh_the_same_and_one_in_all(backend: str) -> None:
    hidden, weight, _ = dyadic(8, 12, 90, torch.float32)
    loss, d_hidden = linear_entropy(hidden, weight, backend=backend)
    expected = linear_entropy(hidden, weight, torch.full((8,), 1 / 8), backend=backend)
    assert torch.equal(loss, expected[0])
    assert torch.equal(d_hidden, expected[1])


each_head = pytest.mark.parametrize(
    ("dtype", "fp32_logits"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)


def watched(hidden: Tensor, weight: Tensor, *keys: Tensor, **options: Any) -> Watch:
    operation, row_weight = options.pop("operation", linear_entropy), torch.ones(len(hidden))
    with Watch(hidden, weight, row_weight) as watch:
        operation(hidden, weight, *keys, row_weight, **options)
    return watch


# tokens, width, vocab, whether there is a bias, and the budget, which chunks just fill: they would
# pass it if a tile or a chunk of hidden that is upcast were left out of the estimate.
SIZES = {
    "torch": [(150, 64, 16001, True, 2 << 20)],
    "cpp": [(150, 64, 16001, True, 2 << 20)],
    "triton": [(12, 64, 4001, False, 1 << 16), (24, 512, 1536, True, 1 << 16)],
}


@each_head
def test_memory_stays_within_the_budget(
    backend: str, dtype: torch.dtype, fp32_logits: bool
) -> None:
    for tokens, width, vocab, has_bias, budget in SIZES[backend]:
        hidden, weight, bias = dyadic(tokens, width, vocab, dtype)
        watch = watched(
            hidden, weight, bias=bias if has_bias else None, fp32_logits=fp32_logits,
            logits_budget_bytes=budget, backend=backend,
        )  # fmt: skip
        rows = 8 * 5 * tokens  # five numbers of 8 bytes a row at most
        # The torch path's pass over the logits holds three fp32 blocks of a million elements.
        block = 4 << 20 if backend == "torch" else 0
        assert budget // 2 < watch.peak <= budget + hidden.nbytes + rows + 3 * block
        assert watch.largest <= max(budget, block) < tokens * vocab * hidden.element_size()


@pytest.mark.parametrize("operation", [linear_entropy, linear_cross_entropy, linear_fisher])
@each_head
def test_flops_and_no_wait_for_the_device(
    backend: str, dtype: torch.dtype, fp32_logits: bool, operation: Any
) -> None:
    hidden, weight, _ = dyadic(9, 12, 333, dtype)
    keys = [] if operation == linear_entropy else [torch.arange(9)]
    options = {"fp32_logits": fp32_logits, "logits_budget_bytes": 2500, "backend": backend}
    flops = FlopCounterMode(display=False)

    def counted(*args: Any, **given: Any) -> Any:
        with flops:
            return operation(*args, **given)

    watch = watched(hidden, weight, *keys, operation=counted, **options)
    waits = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}
    assert not {name.removeprefix("aten::").split(".")[0] for name in watch.names} & waits
    assert watch.flops == flops.get_total_flops() == 4 * 9 * 12 * 333


@pytest.mark.parametrize("vocab", [1, 127, 1001])
def test_rows_of_the_buffer_are_aligned_for_odd_vocabularies(vocab: int) -> None:
    hidden, weight, _ = dyadic(3, 4, vocab, torch.bfloat16)
    _, (dz, _) = watched(hidden, weight, backend="torch").products
    assert dz.stride() == (-(-vocab // 16) * 16, 1)


@pytest.mark.parametrize(("fit", "expected"), [(140, [128, 128, 44]), (100, [100, 100, 100])])
def test_chunks_are_multiples_of_128_rows_where_so_many_fit(
    fit: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    hidden, weight, _ = dyadic(300, 4, 32, torch.bfloat16)
    watch = watched(hidden, weight, logits_budget_bytes=fit * 32 * 2, backend="torch")
    assert [len(h) for h, _ in watch.products[::2]] == expected


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_instructions_for_a_dtype_multiplies_in_fp32(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    hidden, weight, bias = dyadic(20, 8, 100, dtype)
    watch = watched(hidden, weight, bias=bias, backend=backend)
    assert watch.products
    assert {tensor.dtype for pair in watch.products for tensor in pair} == {torch.float32}


@each_precision
def test_fp16_gradients_survive_a_large_vocabulary(backend: str, fp32_logits: bool) -> None:
    hidden, weight, _ = dyadic(3, 12, 32000, torch.float16)
    row_weight = torch.full((3,), 1 / 1024, dtype=torch.float64)
    options: dict[str, Any] = {"fp32_logits": fp32_logits}
    assert_head(linear_entropy, hidden, weight, row_weight, backend, **options)
    _, d_hidden = linear_entropy(hidden, weight, row_weight, backend=backend, **options)
    dz = rows_truth(hidden.double() @ weight.double().T).grad / 1024
    truth = dz @ weight.double()
    # u = eps / 2 from the rounding of d_hidden, and less from those of dz, many and small.
    eps = torch.finfo(torch.float16).eps
    assert relative_error(d_hidden, truth).max() < eps
    unscaled = dz.half()
    assert (unscaled == 0).double().mean() > 0.6
    assert relative_error(unscaled.double() @ weight.double(), truth).min() > 10 * eps


@every_path
@each_precision
def test_grad_scale_is_exact(backend: str, dtype: torch.dtype, fp32_logits: bool) -> None:
    hidden, weight, _ = dyadic(4, 12, 40, dtype)
    options: dict[str, Any] = {"fp32_logits": fp32_logits, "backend": backend}
    expected_loss, expected = linear_entropy(hidden, weight, **options)
    for scale in (1024.0, 8192.0):
        loss, d_hidden = linear_entropy(hidden, weight, grad_scale=scale, **options)
        assert torch.equal(loss, expected_loss)
        assert torch.equal(d_hidden.double() / scale, expected.double())


def test_loss_is_summed_in_fp64(backend: str) -> None:
    row_weight = torch.tensor([2.0**24, 1, 1])
    loss, _ = linear_entropy(torch.zeros(3, 4), torch.zeros(2, 4), row_weight, backend=backend)
    coin = softmax_entropy(torch.zeros(1, 2), backend=backend).double()  # 0.69, log 2
    assert loss == (coin * (2**24 + 2)).float()  # in fp32 each 0.69 would be rounded to 1


def test_fp16_does_not_overflow_where_the_docstring_says() -> None:
    """The steepest dH/dz: one peak of p near 1/2 among many; 2.4 at this V and 3.2 at 300k."""
    hidden = torch.full((1, 1), 10.7, dtype=torch.float16)
    weight = torch.zeros(20_000, 1, dtype=torch.float16)
    weight[0] = 1
    for row_weight, scale in ((3.9, 1.0), (1.9, 8192.0)):
        _, d_hidden = linear_entropy(hidden, weight, torch.tensor([row_weight]), grad_scale=scale)
        assert d_hidden.isfinite().all()
        assert d_hidden.abs() > 2 * row_weight * scale
