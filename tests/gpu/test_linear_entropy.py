"""The head at the sizes of real models."""

from collections.abc import Callable

import pytest
import torch
from on_gpu import BF16, DEVICE, EPS_32, FP16, FP32, blocks, definition, need_gib, poisoned, randn
from tolerances import assert_no_worse
from torch import Tensor

from hfprune_fast.kernels import linear_entropy


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

    def head(h: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ scale · H, its gradient at h) of logits in the dtype of h and w, as float64."""
        z = torch.nn.functional.linear(h, w, None if bias is None else bias.to(h.dtype))
        maths = z if z.dtype == torch.float64 else z.float()
        entropy, grad, _ = definition(maths, scale, **transform)
        back = w if w.dtype == torch.float64 else weight
        return (entropy.double() * scale).sum(), (grad.to(back.dtype) @ back).double()

    true_weight, eager_weight = weight.double(), weight.to(logits_dtype)
    true_loss, eager_loss = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    exponents = EPS_32 * 64  # they are at most 32 here, and are rounded before each exp
    for rows in blocks(tokens, 512):
        true, true_grad = head(clean[rows].double(), true_weight, row_weight[rows])
        eager, eager_grad = head(clean[rows].to(logits_dtype), eager_weight, row_weight[rows])
        true_loss += true
        eager_loss += eager
        got = d_hidden[rows].double() / float(options.get("grad_scale", 1))
        rounding = torch.finfo(dtype).eps
        assert_no_worse(got, eager_grad, true_grad, floor=rounding + exponents)
    # The rounding of logits moves each row's H by less than eps of it, in either direction.
    floor = 4 * torch.finfo(logits_dtype).eps / tokens**0.5 + exponents
    assert_no_worse(loss[None], eager_loss, true_loss, floor=floor)
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
    budget = max(256 << 20, 512 * row_bytes)
    rest = extra - d_hidden.nbytes - min(budget, 8192 * row_bytes)
    name = "linear_entropy, fp32 logits" if fp32_logits else "linear_entropy"
    measured(
        f"{name}: {extra / 2**20:.1f} MiB beside its input, {rest / 2**20:+.1f} on its promise"
    )
    # A workspace of cuBLAS that is taken anew in each call, and 64 bytes a token.
    assert rest <= (64 << 20) + 64 * 8192
