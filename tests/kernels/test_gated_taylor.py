from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import batches
from kernel_inputs import LAYOUTS, integers, random, sparse_memory
from paths import every_path
from taylor_truth import ACTIVATIONS, EXACT_GATES, assert_gated, eager_sums, sums
from torch import Tensor, nn

from hfprune_fast.kernels import (
    TaylorStatistics,
    gated_taylor,
    gated_taylor_reference,
    taylor_statistics,
)

NAN = float("nan")
MODES = ["fresh", "out", "overwrite"]
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def exact_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """grad, gate and up whose gradients and sums are exact in every dtype, in any order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(EXACT_GATES), shape, generator=generator)
    gate = torch.tensor(list(EXACT_GATES), dtype=dtype)[index]
    grad, up = (integers(*shape, dtype=dtype, seed=seed + 1 + i) for i in range(2))
    return [grad, gate, up]


def exact_results(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, slope = (
        sum((gate == z).double() * pair[i] for z, pair in EXACT_GATES.items()) for i in range(2)
    )
    return value * up, grad * up * slope, grad * value


def run(
    mode: str, grad: Tensor, gate: Tensor, up: Tensor, **options: Any
) -> tuple[TaylorStatistics, Tensor, Tensor]:
    if mode == "overwrite":
        return gated_taylor(grad, gate, up, overwrite=True, **options)
    out = None if mode == "fresh" else (torch.empty(gate.shape).to(gate), torch.empty_like(gate))
    return gated_taylor(grad, gate, up, out=out, **options)


@every_path
@each_activation
@settings(deadline=None, max_examples=4)
@given(
    batch=batches(),
    fused=st.sampled_from(["neither", "gate", "both"]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**31),
)
def test_exact_inputs_give_exact_results(
    backend: str, dtype: torch.dtype, activation: str,
    batch: tuple[tuple[int, int, int], Tensor | None], fused: str, layout: str, mode: str,
    seed: int,
) -> None:  # fmt: skip
    shape, mask = batch
    inputs = exact_inputs(shape, dtype, seed)
    act, d_gate, d_up = exact_results(*inputs)
    expected = sums(inputs[0] * act, act, mask)
    if mask is not None:
        padding = ~mask[:, :, None]
        d_gate, d_up = d_gate.masked_fill(padding, 0), d_up.masked_fill(padding, 0)
        inputs = [tensor.masked_fill(padding, NAN) for tensor in inputs]
    width = shape[2]
    memory = torch.full((*shape[:2], 2 * width + 3), NAN, dtype=dtype)
    gate_up = memory[..., : 2 * width]  # rows with a gap
    gate_up.copy_(torch.cat(inputs[1:], dim=2))
    gate, up = gate_up.chunk(2, dim=2) if fused != "neither" else inputs[1:]
    up = up if fused == "both" else up.clone()
    before = memory.clone()

    got, got_d_gate, got_d_up = run(
        mode, LAYOUTS[layout](inputs[0]), gate, up,
        activation=activation, token_mask=mask, backend=backend,
    )  # fmt: skip
    assert torch.equal(torch.stack(got), expected)
    assert torch.equal(got_d_gate.double(), d_gate)
    assert torch.equal(got_d_up.double(), d_up)
    if mode == "overwrite":
        assert got_d_gate.data_ptr() == gate.data_ptr()
        assert got_d_up.data_ptr() == up.data_ptr()
        assert memory[..., 2 * width :].isnan().all()  # what lies between the rows
    else:
        assert torch.equal(memory.nan_to_num(9.0), before.nan_to_num(9.0))


@every_path
@each_activation
def test_equals_float64(backend: str, dtype: torch.dtype, activation: str) -> None:
    grad, up = random(1, 130, 9, dtype=dtype, scale=1e-3), random(1, 130, 9, dtype=dtype, seed=2)
    gate = (random(1, 130, 9, seed=1) * torch.tensor([0.5, 8.0, 1.0] * 3)).to(dtype)
    got = gated_taylor(grad, gate, up, activation=activation, backend=backend)
    assert_gated(got, (grad, gate, up), activation, backend=backend)


@each_activation
def test_the_reference_is_what_is_computed(activation: str) -> None:
    inputs = [random(2, 5, 7, dtype=torch.float64, seed=i) for i in range(3)]
    results = [f(*inputs, activation=activation) for f in (gated_taylor, gated_taylor_reference)]
    for ours, theirs in zip(*([*got, *grads] for got, *grads in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_autograd_sees_what_was_overwritten(backend: str) -> None:
    """So that a second backward pass raises and does not read gradients as gate and up."""
    tensors = [random(1, 3, 8, seed=i) for i in range(3)]
    gated_taylor(*tensors, backend=backend)
    assert [tensor._version for tensor in tensors] == [0, 0, 0]
    gated_taylor(*tensors, overwrite=True, backend=backend)
    assert [tensor._version > 0 for tensor in tensors] == [False, True, True]


@every_path
def test_grad_scale_leaves_the_gradients_scaled(backend: str, dtype: torch.dtype) -> None:
    grad, gate, up = (random(2, 9, 5, dtype=dtype, seed=i) for i in range(3))
    expected, d_gate, d_up = gated_taylor(grad, gate, up, backend=backend)
    got, *scaled = gated_taylor(16 * grad, gate, up, grad_scale=16.0, backend=backend)
    assert torch.equal(torch.stack(got), torch.stack(expected))
    if dtype != torch.float16:  # whose subnormals are coarse
        assert torch.equal(scaled[0], 16 * d_gate)
        assert torch.equal(scaled[1], 16 * d_up)


@each_activation
@pytest.mark.parametrize("mode", MODES)
def test_parity_rounds_as_eager_autograd(activation: str, mode: str) -> None:
    inputs = [random(40, 20, 30, dtype=torch.bfloat16, seed=i) for i in range(3)]
    grad, gate, up = inputs
    function = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}
    leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
    act = function[activation](leaves[0]) * leaves[1]
    d_gate, d_up = torch.autograd.grad(act, leaves, grad)
    exact, *_ = gated_taylor(grad, gate, up, activation=activation)
    got, got_d_gate, got_d_up = run(mode, *inputs, activation=activation, parity=True)
    assert torch.equal(torch.stack(got), eager_sums(grad, act.detach()))
    assert torch.equal(got_d_gate, d_gate)
    assert torch.equal(got_d_up, d_up)
    assert not torch.equal(got.l1.double(), exact.l1)


@pytest.mark.parametrize("mode", ["out", "overwrite"])
@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 1, 5)])
def test_tokens_beyond_2_to_the_31_elements(
    backend: str, mode: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    # The third token starts 2^31 elements after the first: if the offset wraps, as far before it.
    memory, strides = sparse_memory(tmp_path), (shape[1] * 2**30, 2**30, 1)
    tensors = [memory.as_strided(shape, strides, 2**31 + 8 * i) for i in range(5)]
    for tensor, values in zip(tensors, exact_inputs(shape, torch.bfloat16), strict=False):
        tensor.copy_(values)
    act, d_gate, d_up = exact_results(*tensors[:3])
    expected = sums(tensors[0] * act, act)
    where: Any = {"overwrite": True} if mode == "overwrite" else {"out": tuple(tensors[3:])}
    got, *gradients = gated_taylor(*tensors[:3], **where, backend=backend)
    assert torch.equal(torch.stack(got), expected)
    assert torch.equal(gradients[0].double(), d_gate)
    assert torch.equal(gradients[1].double(), d_up)
    assert (memory[:64] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parity", [False, True])
def test_empty(shape: tuple[int, int, int], mode: str, parity: bool) -> None:
    empty = [torch.empty(shape) for _ in range(3)]
    got, d_gate, d_up = run(mode, *empty, parity=parity)
    dtype = torch.float32 if parity else torch.float64
    assert torch.equal(torch.stack(got), torch.zeros(4, shape[2], dtype=dtype))
    alone = taylor_statistics(*empty[:2], parity=parity)
    assert torch.equal(torch.stack(alone), torch.stack(got))
    assert d_gate.shape == d_up.shape == shape


@pytest.mark.parametrize("layout", ["every second column", "tokens first", "neurons first"])
@pytest.mark.parametrize("mode", ["out", "overwrite"])
@pytest.mark.parametrize("parity", [False, True])
def test_outputs_without_one_stride_of_tokens_are_refused(
    layout: str, mode: str, parity: bool
) -> None:
    # Such a tensor can only be copied, and the copy would be overwritten instead.
    bad, good = LAYOUTS[layout](torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4)
    for pair in ((bad, good), (good, bad)):
        gate_up = (good, good) if mode == "out" else pair
        where: Any = {"out": pair} if mode == "out" else {"overwrite": True}
        with pytest.raises(ValueError, match=r"one stride over B and S, got \("):
            gated_taylor(good, *gate_up, **where, parity=parity)


@every_path
@pytest.mark.parametrize("place", [0, 1])
def test_gradients_may_be_written_over_grad(backend: str, dtype: torch.dtype, place: int) -> None:
    for parity in [False, True][: 1 + (backend == "torch")]:  # parity is plain torch
        options: dict[str, Any] = {"parity": parity, "backend": backend}
        grad, gate, up = (random(2, 9, 40, dtype=dtype, seed=i) for i in range(3))
        expected = gated_taylor(grad, gate, up, **options)
        out = [torch.empty_like(gate), torch.empty_like(gate)]
        out[place] = grad
        got = gated_taylor(grad, gate, up, out=(out[0], out[1]), **options)
        assert all(map(torch.equal, (*got[0], *got[1:]), (*expected[0], *expected[1:])))


def test_inputs_may_be_one_tensor() -> None:
    grad, gate = random(2, 3, 4), random(2, 3, 4, seed=1)
    results = gated_taylor(grad, gate, gate), gated_taylor(grad, gate, gate.clone())
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))
    with pytest.raises(ValueError, match="the same tensor"):  # but not outputs
        gated_taylor(grad, gate, gate, out=(grad, grad))


@pytest.mark.parametrize("parity", [False, True])
def test_outputs_that_share_a_part_of_an_input_are_refused(parity: bool) -> None:
    grad, gate, up, free = (random(2, 3, 4, seed=i) for i in range(4))
    memory, fused = torch.zeros(100), torch.zeros(2, 3, 12)
    row_on, wider = memory[4:28].view(2, 3, 4), memory[:60].view(2, 3, 10)[..., 2:6]
    left, middle, right = fused[..., :4], fused[..., 2:6], fused[..., 8:]
    options: dict[str, Any] = {"parity": parity}
    for source, target in (
        (memory[:24].view(2, 3, 4), row_on), (row_on, memory[:24].view(2, 3, 4)),
        (row_on, wider), (left, middle),
    ):  # fmt: skip
        for out in ((target, free), (free, target)):
            for inputs in ((source, gate, up), (grad, source, up), (grad, gate, source)):
                with pytest.raises(ValueError, match="itself or lie apart from it"):
                    gated_taylor(*inputs, out=out, **options)
    with pytest.raises(ValueError, match="the same tensor"):
        gated_taylor(grad, gate, up, out=(left, middle), **options)
    # Columns of one tensor that lie apart, and one that is shared element by element.
    for inputs, out in (
        ((grad, left, right), (left, right)), ((grad, left, up), (left, right)),
        ((grad, gate, up), (up, gate)), ((right, gate, up), (left, free)),
    ):  # fmt: skip
        expected = gated_taylor(*(t.clone() for t in inputs), **options)
        got = gated_taylor(*inputs, out=out, **options)
        assert all(map(torch.equal, (*got[0], *got[1:]), (*expected[0], *expected[1:])))


def test_large_gradients_of_closed_gates_do_not_overflow(backend: str) -> None:
    grad, gate, up = (torch.full((1, 1, 1), x) for x in (1e30, -80.0, 1e30))
    _, d_gate, _ = gated_taylor(grad, gate, up, backend=backend)
    _, expected, _ = gated_taylor(grad.double(), gate.double(), up.double())
    torch.testing.assert_close(d_gate.double(), expected, rtol=1e-4, atol=0)
