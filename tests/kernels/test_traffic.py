"""The bytes a logit or an element that the docs of the operations promise."""

from functools import partial

import pytest
import torch
from kernel_inputs import random
from paths import needs_triton
from torch import Tensor
from traffic import Touched, kernel_traffic

from hfprune_fast.kernels import (
    gated_taylor,
    linear_cross_entropy,
    linear_entropy,
    linear_fisher,
    linear_kl,
    linear_self_distillation,
    rms_norm,
    rotary,
    softmax_entropy,
    softmax_entropy_grad_,
    taylor_statistics,
)

bf16 = partial(random, dtype=torch.bfloat16)
# One block of 8192 and less, and some with a rest.
VOCABULARIES = [1000, 20001]
# Whole chunks of 128 tokens and blocks of neurons, and neither.
SHAPES = [(1, 128, 128), (2, 130, 200)]


def read_twice(vocab: int, step: int = 4096) -> int:
    """Entries of a row in whole steps of a kernel; it keeps the rest, and reads it once."""
    return vocab // step * step


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_softmax_entropy_reads_a_logit_once_and_in_its_backward_twice(
    vocab: int, dtype: torch.dtype
) -> None:
    logits = random(3, vocab, dtype=dtype).requires_grad_()
    size = logits.numel() * dtype.itemsize
    with kernel_traffic(logits=logits) as forward:
        entropy = softmax_entropy(logits, backend="triton")
    assert forward.read == {"logits": size}
    assert forward.written == {"fp32": 4 * 3}
    with kernel_traffic(logits=logits) as backward:
        entropy.sum().backward()
    again = 3 * read_twice(vocab) * dtype.itemsize
    assert backward.read == {"logits": size + again, "fp32": 4 * 3}
    # The gradient is a tensor of its own, known by its dtype alone, as the entropy is.
    written = {"bf16": size, "fp32": 4 * 3} if dtype == torch.bfloat16 else {"fp32": size + 4 * 3}
    assert backward.written == written


@needs_triton
@pytest.mark.parametrize("options", [{}, {"softcap": 8.0, "logit_scale": 0.5}])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_softmax_entropy_grad_takes_two_reads_and_one_write(
    vocab: int, options: dict[str, float]
) -> None:
    logits = bf16(3, vocab + 5)[:, :vocab]  # rows that lie apart
    with kernel_traffic(logits=logits) as traffic:
        softmax_entropy_grad_(logits, torch.ones(3), backend="triton", **options)
    assert traffic.read == {"logits": 2 * 3 * (vocab + read_twice(vocab)), "fp32": 4 * 3}
    assert traffic.written == {"logits": 2 * 3 * vocab, "fp32": 4 * 3}


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_plain_torch_takes_two_reads_and_one_write_too(vocab: int) -> None:
    logits = bf16(60, vocab)

    def is_logits(tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()

    with Touched(is_logits) as forward:
        softmax_entropy(logits, backend="torch")
    with Touched(is_logits) as both:
        softmax_entropy_grad_(logits, torch.ones(60), backend="torch")
    assert (forward.read, forward.written) == (2 * logits.numel(), 0)
    assert (both.read, both.written) == (2 * logits.numel(), logits.numel())


@needs_triton
@pytest.mark.parametrize("vocab", [1000, 9001])
def test_linear_entropy_moves_ten_bytes_a_logit(vocab: int) -> None:
    tokens, rows = 20, 5
    hidden, weight = bf16(tokens, 12), bf16(vocab, 12)
    budget = rows * 2 * (-(-vocab // 16) * 16)
    with (
        kernel_traffic(hidden=hidden, weight=weight) as a_pass,
        Touched(lambda tensor: tensor.shape == (rows, vocab)) as products,
    ):
        linear_entropy(hidden, weight, logits_budget_bytes=budget, backend="triton")
    logits = tokens * vocab
    assert (products.read, products.written) == (logits, logits)
    again = tokens * read_twice(vocab)
    assert a_pass.read == {"bf16": 2 * (logits + again), "fp32": 4 * tokens}
    assert a_pass.written == {"bf16": 2 * logits, "fp32": 4 * tokens}
    assert 2 * (products.read + products.written) + a_pass.of("bf16") == 8 * logits + 2 * again


@needs_triton
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_labels_add_an_entry_a_row_and_samples_a_lane(vocab: int) -> None:
    tokens = 6
    hidden, weight, keys = bf16(tokens, 12), bf16(vocab, 12), torch.arange(tokens)
    with kernel_traffic(hidden=hidden, weight=weight, keys=keys) as labelled:
        linear_cross_entropy(hidden, weight, keys, backend="triton")
    with kernel_traffic(hidden=hidden, weight=weight, keys=keys) as sampled:
        linear_fisher(hidden, weight, keys, backend="triton")
    with kernel_traffic(hidden=hidden, weight=weight, keys=keys) as distilled:
        linear_self_distillation(hidden, weight, keys, backend="triton")
    both = 2 * tokens * (vocab + read_twice(vocab))
    written = 2 * tokens * (vocab + 1)  # the label's entry again, less its share
    assert (distilled.read, distilled.written) == (labelled.read, labelled.written)
    assert labelled.read == {"bf16": both + 2 * tokens, "fp32": 4 * tokens, "keys": 8 * tokens}
    assert both < sampled.read["bf16"] <= both + 2 * tokens * 8 * -(-vocab // 4096)
    assert sampled.read["keys"] == 8 * tokens
    assert labelled.written == sampled.written == {"bf16": written, "fp32": 4 * tokens}


@needs_triton
@pytest.mark.parametrize("vocab", [1000, 9001])
def test_linear_kl_moves_sixteen_bytes_an_entry(vocab: int) -> None:
    tokens, rows = 12, 4
    hidden, weight = bf16(tokens, 12), bf16(vocab, 12)
    teacher_hidden, teacher_weight = bf16(tokens, 8), bf16(vocab, 8)
    budget = rows * 2 * 2 * (-(-vocab // 16) * 16)
    with (
        kernel_traffic() as a_pass,
        Touched(lambda tensor: tensor.shape == (rows, vocab)) as products,
    ):
        linear_kl(
            hidden, weight, teacher_hidden, teacher_weight,
            logits_budget_bytes=budget, backend="triton",
        )  # fmt: skip
    logits = tokens * vocab
    assert (products.read, products.written) == (logits, 2 * logits)
    again = 2 * tokens * read_twice(vocab, 8192)
    assert a_pass.read == {"bf16": 2 * (2 * logits + again), "fp32": 4 * tokens}
    assert a_pass.written == {"bf16": 2 * logits, "fp32": 4 * tokens}
    assert 2 * (products.read + products.written) + a_pass.of("bf16") == 12 * logits + 2 * again


@needs_triton
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_taylor_reads_three_and_writes_two(
    shape: tuple[int, int, int], overwrite: bool
) -> None:
    batch, seq_len, width = shape
    grad, gate, up = (bf16(*shape) for _ in range(3))
    named = {"grad": grad, "gate": gate, "up": up}
    out = None if overwrite else (torch.empty_like(gate), torch.empty_like(up))
    if out is not None:
        named |= {"d_gate": out[0], "d_up": out[1]}
    with kernel_traffic(**named) as traffic:
        gated_taylor(grad, gate, up, overwrite=overwrite, out=out, backend="triton")
    size, partials = 2 * grad.numel(), 16 * width * batch * -(-seq_len // 128)
    written = ("gate", "up") if overwrite else ("d_gate", "d_up")
    assert traffic.read == {"grad": size, "gate": size, "up": size, "fp32": partials}
    assert traffic.written == dict.fromkeys(written, size) | {"fp32": partials, "fp64": 32 * width}
    if seq_len % 128 == 0:
        assert traffic.of(*named, "fp32") == 10.25 * grad.numel()


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_taylor_statistics_reads_two(shape: tuple[int, int, int]) -> None:
    batch, seq_len, width = shape
    grad, act = bf16(*shape), bf16(*shape)
    with kernel_traffic(grad=grad, act=act) as traffic:
        taylor_statistics(grad, act, backend="triton")
    size, partials = 2 * grad.numel(), 16 * width * batch * -(-seq_len // 128)
    assert traffic.read == {"grad": size, "act": size, "fp32": partials}
    assert traffic.written == {"fp32": partials, "fp64": 32 * width}
    if seq_len % 128 == 0:
        assert traffic.of("grad", "act", "fp32") == 4.25 * grad.numel()


@needs_triton
def test_padding_is_not_read() -> None:
    grad, gate, up = (bf16(2, 130, 40) for _ in range(3))
    token_mask = torch.arange(130) < torch.tensor([[130], [7]])
    with kernel_traffic(grad=grad, gate=gate, up=up, token_mask=token_mask) as traffic:
        gated_taylor(grad, gate, up, overwrite=True, token_mask=token_mask, backend="triton")
    for name in ("grad", "gate", "up"):
        assert traffic.read[name] == 2 * 40 * (130 + 7)
    assert traffic.read["token_mask"] == 2 * 130  # once for each block of neurons, here one
    assert traffic.written["gate"] == traffic.written["up"] == 2 * grad.numel()


@needs_triton
@pytest.mark.parametrize(("rows", "width"), [(5, 96), (70, 64), (3, 4096)])
def test_rms_norm_reads_once_and_writes_once(rows: int, width: int) -> None:
    x, weight = bf16(rows, width).requires_grad_(), bf16(width)
    grad = bf16(rows, width, seed=1)
    size, programs = 2 * rows * width, -(-rows // max(1, 4096 // (1 << (width - 1).bit_length())))
    with kernel_traffic(x=x, weight=weight) as forward:
        y = rms_norm(x, weight, eps=1e-5, backend="triton")
    of_weight = 2 * width * programs  # which L2 keeps
    assert forward.read == {"x": size, "weight": of_weight}
    assert forward.written == {"bf16": size, "fp32": 4 * rows}
    with kernel_traffic(x=x, weight=weight, grad=grad) as backward:
        y.backward(grad)
    assert backward.read == {"x": size, "grad": size, "weight": of_weight, "fp32": 4 * rows}
    assert backward.written == {"bf16": size}


@needs_triton
def test_rows_longer_than_registers_are_read_twice() -> None:
    x, weight = bf16(1, 16_400).requires_grad_(), bf16(16_400)
    with kernel_traffic(x=x) as forward:
        y = rms_norm(x, weight, eps=1e-5, backend="triton")
    with kernel_traffic(x=x) as backward:
        y.sum().backward()
    assert forward.read["x"] == backward.read["x"] == 2 * 2 * x.numel()


@needs_triton
def test_rotary_reads_once_and_writes_once() -> None:
    q, k = bf16(2, 7, 5, 80).transpose(1, 2).requires_grad_(), bf16(2, 2, 7, 80)
    cos, sin = bf16(1, 7, 80), bf16(1, 7, 80)
    q_grad = torch.ones_like(q)
    with kernel_traffic(q=q, k=k, cos=cos, sin=sin) as forward:
        q_turned, _ = rotary(q, k, cos, sin, backend="triton")
    tables = 2 * 2 * 2 * cos.numel()  # for q and k, and for each sequence
    q_size, k_size = 2 * q.numel(), 2 * k.numel()
    assert forward.read == {"q": q_size, "k": k_size, "cos": tables, "sin": tables}
    assert forward.written == {"bf16": q_size + k_size}
    with kernel_traffic(q_grad=q_grad, cos=cos, sin=sin) as backward:
        q_turned.backward(q_grad)
    assert backward.read == {"q_grad": q_size, "cos": tables / 2, "sin": tables / 2}
    assert backward.written == {"bf16": q_size}
