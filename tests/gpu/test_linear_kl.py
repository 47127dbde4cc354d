"""Distillation at the sizes of real models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import BF16, DEVICE, EPS_32, FP16, FP32, blocks, need_gib, poisoned, randn
from tolerances import assert_no_worse

from hfprune_fast.kernels import linear_kl, linear_kl_loss, linear_kl_reference
from hfprune_fast.kernels._kl_rows import kl_rows_and_grad


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "dtype", "options"),
    [
        (4096, 4096, 128256, BF16, {}),
        (1111, 2048, 151936, BF16, {"fp32_logits": True}),
        (1111, 2048, 151936, FP16, {"grad_scale": 8.0}),
        (1111, 4096, 32000, BF16, {"softcap": 30.0, "teacher_softcap": 50.0, "temperature": 2.0}),
        (777, 1024, 32001, BF16, {"logits_budget_bytes": 10 << 20, "teacher_logit_scale": 0.5}),
        (777, 1024, 32001, FP32, {}),
    ],
)
def test_linear_kl(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    need_gib(24)
    hidden = randn(tokens, width, dtype=dtype)
    teacher = hidden + randn(tokens, width, dtype=dtype, scale=0.3)
    weight = randn(vocab, width, dtype=dtype, scale=3 / width**0.5)
    row_weight = torch.rand(tokens, device=DEVICE) + 0.5
    row_weight[-3:] = 0  # padding
    clean = hidden.clone()
    clean[-3:] = 0
    hidden[-3:] = torch.nan
    with poisoned():
        loss, d_hidden = linear_kl(hidden, weight, teacher, weight, row_weight, **options)
    own = ("fp32_logits", "grad_scale", "logits_budget_bytes")
    transform = {name: value for name, value in options.items() if name not in own}
    logits_dtype = FP32 if options.get("fp32_logits") else dtype
    heads = [(wide, weight.to(wide)) for wide in (torch.float64, logits_dtype)]
    losses = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    exponents = EPS_32 * 64  # they are at most 32 here, and are rounded before each exp
    for rows in blocks(tokens, 512):
        grads = []
        for i, (wide, w) in enumerate(heads):
            block_loss, grad = linear_kl_reference(
                clean[rows].to(wide), w, teacher[rows].to(wide), w, row_weight[rows].double(),
                **transform,
            )  # fmt: skip
            losses[i] += block_loss
            grads.append(grad)
        got = d_hidden[rows].double() / float(options.get("grad_scale", 1))
        rounding = torch.finfo(dtype).eps
        assert_no_worse(got, grads[1].to(dtype), grads[0], floor=rounding + exponents)
    # The rounding of logits, of size 8, moves each row's KL of about 0.4 in either direction.
    floor = 16 * torch.finfo(logits_dtype).eps / tokens**0.5 + exponents
    assert_no_worse(loss[None], losses[1], losses[0], floor=floor)
    assert (d_hidden[-3:] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_trained_head(dtype: torch.dtype) -> None:
    need_gib(8)
    hidden, teacher = (randn(1500, 512, dtype=dtype) for _ in range(2))
    weight = randn(32_000, 512, dtype=dtype, scale=3 / 512**0.5)
    trained = weight.clone().requires_grad_()
    loss = linear_kl_loss(hidden, trained, teacher, weight, logits_budget_bytes=32 << 20)
    (grad,) = torch.autograd.grad(loss, trained)
    truths = []
    for wide in (torch.float64, dtype):
        leaf, w = weight.to(wide).requires_grad_(), weight.to(wide)
        log_q = (hidden.to(wide) @ leaf.T).log_softmax(-1)
        log_p = (teacher.to(wide) @ w.T).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum() / 1500
        truths.append(torch.autograd.grad(kl, leaf)[0].flatten())
    floor = 4 * torch.finfo(dtype).eps + 64 * EPS_32
    assert_no_worse(grad.flatten(), truths[1], truths[0], floor=floor)


@pytest.mark.parametrize(("dtype", "factor"), [(BF16, 1 / 3), (FP16, 2.0**17)])
def test_the_backward_pass_multiplies_before_it_rounds(dtype: torch.dtype, factor: float) -> None:
    """Also by a factor that fp16 cannot hold, as torch.amp.GradScaler's, 65536."""
    hidden, teacher = (randn(64, 128, dtype=dtype).requires_grad_() for _ in range(2))
    weight = randn(1000, 128, dtype=dtype, scale=0.1)
    rare = torch.full((64,), 2.0**-12, device=DEVICE)
    loss = linear_kl_loss(hidden, weight, teacher, weight, rare)
    (kept,) = torch.autograd.grad(loss, hidden, torch.ones_like(loss), retain_graph=True)
    (grad,) = torch.autograd.grad(loss, hidden, torch.full_like(loss, factor))
    exact = kept.double() * torch.full_like(loss, factor).double()
    assert torch.equal(grad, exact.to(dtype))


def test_rows_past_two_to_the_31_elements() -> None:
    need_gib(16)
    tokens, vocab = 17_000, 152_064
    logits, teacher = randn(tokens, vocab, scale=3), randn(tokens, vocab, scale=3)
    scale = torch.rand(tokens, device=DEVICE) + 0.5
    boundary = 2**31 // vocab
    some = [slice(0, 8), slice(boundary - 8, boundary + 8), slice(tokens - 8, tokens)]
    before = [logits[rows].clone() for rows in some]
    plain = (None, 1.0)
    values = kl_rows_and_grad(logits, teacher, scale, logits, plain, plain, None)
    assert values.isfinite().all()
    assert all(logits[rows].isfinite().all() for rows in blocks(tokens))
    for rows, z in zip(some, before, strict=True):
        grad = torch.empty_like(z)
        again = kl_rows_and_grad(z, teacher[rows], scale[rows], grad, plain, plain, None)
        assert torch.equal(values[rows], again)
        assert torch.equal(logits[rows], grad)


def test_linear_kl_memory(measured: Callable[[str], None]) -> None:
    need_gib(6)
    hidden, teacher = randn(8192, 4096), randn(8192, 4096)
    weight = randn(128_256, 4096, scale=3 / 64)
    for _ in range(2):  # the first call compiles, and makes cuBLAS take its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, d_hidden = linear_kl(hidden, weight, teacher, weight)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    rest = extra - d_hidden.nbytes - max(384 << 20, 512 * 4 * 128_256)
    measured(f"linear_kl: {rest / 2**20:+.1f} MiB on its promise")
    # A workspace of cuBLAS that is taken anew in each call, and 64 bytes a token.
    assert rest <= (64 << 20) + 64 * 8192
