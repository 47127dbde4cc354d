import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import batches
from kernel_inputs import LAYOUTS, integers, random, token_mask
from paths import every_path
from taylor_truth import eager_sums, statistics_bound, sums
from torch import Tensor

from hfprune_fast.kernels import taylor_statistics, taylor_statistics_reference
from hfprune_fast.kernels._statistics_triton import _SUM_CONFIG

NAN = float("nan")


@every_path
@settings(deadline=None, max_examples=8)
@given(
    batch=batches(),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    seed=st.integers(0, 2**31),
)
def test_whole_numbers_give_exact_sums(
    backend: str, dtype: torch.dtype, batch: tuple[tuple[int, int, int], Tensor | None],
    layouts: tuple[str, str], seed: int,
) -> None:  # fmt: skip
    shape, mask = batch
    tensors = [integers(*shape, dtype=dtype, seed=seed + i) for i in range(2)]
    expected = sums(tensors[0] * tensors[1], tensors[1], mask)
    if mask is not None:
        tensors = [tensor.masked_fill(~mask[:, :, None], NAN) for tensor in tensors]
    grad, act = (LAYOUTS[name](t) for name, t in zip(layouts, tensors, strict=True))
    got = taylor_statistics(grad, act, token_mask=mask, backend=backend)
    assert torch.equal(torch.stack(got), expected)
    for tensor, before in zip((grad, act), tensors, strict=True):  # inputs are left alone
        assert torch.equal(tensor.nan_to_num(9.0), before.nan_to_num(9.0))


@every_path
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 130, 5)])
def test_rounding_is_bounded(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    grad, act = random(*shape, dtype=dtype, scale=1e-3), random(*shape, dtype=dtype, seed=1)
    got = torch.stack(taylor_statistics(grad, act, backend=backend))
    reference = torch.stack(taylor_statistics_reference(grad, act))
    # Truth and reference are fp64 as well, and round as the torch path does.
    truth = sums(grad.double() * act.double(), act)
    bound, bound_64 = (statistics_bound(grad, act, path) for path in (backend, "torch"))
    assert ((got - truth).abs() <= bound + bound_64).all()
    assert ((reference - truth).abs() <= 2 * bound_64).all()


# Chunks of 128 tokens, and more of them than one step of the second stage reads.
@pytest.mark.parametrize("seq_len", [130, 3 * 128 + 4])
def test_fisher_mask_squares_the_sum_of_a_whole_sequence(
    backend: str, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SUM_CONFIG, "BLOCK_C", 2)
    # One sequence cancels only from one chunk of 128 tokens to the next, the other adds up.
    grad = torch.ones(2, seq_len, 3)
    grad[0, : seq_len // 2] = -1
    got = taylor_statistics(grad, torch.full_like(grad, 2), backend=backend)
    assert got.fisher_mask.tolist() == [(2.0 * seq_len) ** 2] * 3
    assert got.l1.tolist() == [4.0 * seq_len] * 3


def test_sums_over_sequences_are_fp64(backend: str) -> None:
    grad = torch.tensor([2.0**30, 2.0**-10, 2.0**-10])[:, None, None]
    got = taylor_statistics(grad, torch.ones(3, 1, 1), backend=backend)
    assert got.l1.item() == 2.0**30 + 2.0**-9
    assert got.l2.item() == got.fisher_mask.item() == 2.0**60  # + 2^-19, which fp64 cannot hold


@every_path
def test_a_padded_batch_equals_one_sequence_at_a_time(backend: str, dtype: torch.dtype) -> None:
    grad, act = random(4, 140, 5, dtype=dtype), random(4, 140, 5, dtype=dtype, seed=1)
    for side in ("right", "left"):
        mask = token_mask([129, 1, 140, 128], 140, side)
        got = torch.stack(taylor_statistics(grad, act, token_mask=mask, backend=backend))
        one_at_a_time = torch.zeros_like(got)
        for g, a, tokens in zip(grad, act, mask, strict=True):
            single = taylor_statistics(g[tokens][None], a[tokens][None], backend=backend)
            one_at_a_time += torch.stack(single)
        if side == "right" and backend == "triton":  # the same sums in the same order
            assert torch.equal(got, one_at_a_time)
        bound = statistics_bound(grad, act.masked_fill(~mask[:, :, None], 0), backend)
        assert ((got - one_at_a_time).abs() <= 2 * bound).all()


@every_path
def test_grad_scale_is_taken_out_exactly(backend: str, dtype: torch.dtype) -> None:
    grad, act = random(2, 9, 5, dtype=dtype), random(2, 9, 5, dtype=dtype, seed=1)
    expected = taylor_statistics(grad, act, backend=backend)
    for scale in (1024.0, 2.0**-4):
        got = taylor_statistics(grad * scale, act, grad_scale=scale, backend=backend)
        assert torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_rounds_as_the_reference_implementation(dtype: torch.dtype) -> None:
    grad, act = random(40, 20, 30, dtype=dtype), random(40, 20, 30, dtype=dtype, seed=1)
    got = taylor_statistics(grad, act, parity=True)
    assert torch.equal(torch.stack(got), eager_sums(grad, act))
    assert got.l1.dtype == dtype
    assert not torch.equal(got.l1.double(), taylor_statistics(grad, act).l1)
