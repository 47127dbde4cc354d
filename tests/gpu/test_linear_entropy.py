"""The head at the sizes of real models."""

from collections.abc import Callable

import pytest
import torch
from on_gpu import BF16, DEVICE, EPS_32, FP16, FP32, blocks, need_gib, poisoned, randn
from tolerances import assert_no_worse

from hfprune_fast.kernels import linear_entropy, linear_entropy_reference


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "dtype", "options"),
    [
        (8192, 4096, 128256, BF16, {}),
        (2048, 4096, 128256, BF16, {"fp32_logits": True}),
        (1111, 3584, 152064, BF16, {}),
        (1111, 2048, 151936, FP16, {"grad_scale": 8.0}),
        (1111, 2048, 151936, FP16, {"fp32_logits": True}),
        (2000, 4096, 32000, BF16, {"bias": True, "softcap": 30.0, "logit_scale": 0.5}),
        (777, 1024, 32001, BF16, {"bias": True, "logits_budget_bytes": 10 << 20}),
        (777, 1024, 32001, FP32, {}),
    ],
)
def test_linear_entropy(
    tokens: int, width: int, vocab: int, dtype: torch.dtype, options: dict[str, object]
) -> None:
    need_gib(24)
    hidden = randn(tokens, width, dtype=dtype)
    weight = randn(vocab, width, dtype=dtype, scale=3 / width**0.5)
    bias = randn(vocab, dtype=dtype) if options.get("bias") else None
    row_weight = torch.rand(tokens, device=DEVICE) + 0.5
    row_weight[-3:] = 0  # padding
    clean = hidden.clone()
    clean[-3:] = 0
    hidden[-3:] = torch.nan
    with poisoned():
        loss, d_hidden = linear_entropy(hidden, weight, row_weight, **{**options, "bias": bias})
    transform = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
    logits_dtype = FP32 if options.get("fp32_logits") else dtype
    heads = [
        (wide, weight.to(wide), None if bias is None else bias.to(wide))
        for wide in (torch.float64, logits_dtype)
    ]
    losses = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    exponents = EPS_32 * 64  # they are at most 32 here, and are rounded before each exp
    for rows in blocks(tokens, 512):
        grads = []
        for i, (wide, w, b) in enumerate(heads):
            block_loss, grad = linear_entropy_reference(
                clean[rows].to(wide), w, row_weight[rows].double(), bias=b, **transform
            )
            losses[i] += block_loss
            grads.append(grad)
        got = d_hidden[rows].double() / float(options.get("grad_scale", 1))
        rounding = torch.finfo(dtype).eps
        assert_no_worse(got, grads[1].to(dtype), grads[0], floor=rounding + exponents)
    # The rounding of logits moves each row's H by less than eps of it, in either direction.
    floor = 4 * torch.finfo(logits_dtype).eps / tokens**0.5 + exponents
    assert_no_worse(loss[None], losses[1], losses[0], floor=floor)
    assert (d_hidden[-3:] == 0).all()


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_linear_entropy_memory(fp32_logits: bool, measured: Callable[[str], None]) -> None:
    need_gib(6)
    hidden, weight = randn(8192, 4096), randn(128_256, 4096, scale=3 / 64)
    row_weight = torch.rand(8192, device=DEVICE)
    for _ in range(2):  # the first call compiles, and makes cuBLAS take its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, d_hidden = linear_entropy(hidden, weight, row_weight, fp32_logits=fp32_logits)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    row_bytes = 128_256 * (6 if fp32_logits else 2)
    budget = max(384 << 20, 512 * row_bytes)
    rest = extra - d_hidden.nbytes - min(budget, 8192 * row_bytes)
    measured(f"linear_entropy, {fp32_logits=}: {rest / 2**20:+.1f} MiB on its promise")
    # A workspace of cuBLAS that is taken anew in each call, and 64 bytes a token.
    assert rest <= (64 << 20) + 64 * 8192
