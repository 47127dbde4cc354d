"""Norms and rotary embeddings at the sizes of real models, beside transformers' own on the GPU."""

import pytest
import torch
from on_gpu import BF16, DEVICE, FP16, FP32, poisoned, randn
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hfprune_fast.kernels import rms_norm, rms_norm_reference, rotary


@pytest.mark.parametrize("width", [128, 576, 3584, 4096, 16_384, 18_432])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, grad = (randn(4, 512, width, dtype=dtype) for _ in range(2))
    module = LlamaRMSNorm(width, eps=1e-5).to(DEVICE, dtype)
    module.weight = nn.Parameter(randn(width, dtype=dtype), requires_grad=False)
    made = []
    with poisoned():
        for norm in (
            lambda x: rms_norm(x, module.weight, eps=1e-5),
            module,
            lambda x: rms_norm_reference(x, module.weight.double(), eps=1e-5),
        ):
            leaf = x.clone().requires_grad_() if len(made) < 2 else x.double().requires_grad_()
            y = norm(leaf)
            made.append((y.detach(), torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]))
    for ours, eager, truth in zip(*made, strict=True):
        error, allowed = ((t.double() - truth).norm(dim=-1) for t in (ours, eager))
        # Besides, a rounding to the dtype and one of fp32 for each doubling of the sum.
        floor = torch.finfo(dtype).eps + torch.finfo(FP32).eps * (8 + width.bit_length())
        assert (error <= 2 * allowed + floor * truth.norm(dim=-1)).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_rotary_is_transformers_own_to_the_bit(width: int, dtype: torch.dtype) -> None:
    q = randn(4, 512, 32, width, dtype=dtype).transpose(1, 2).requires_grad_()
    k = randn(4, 512, 8, width, dtype=dtype).transpose(1, 2).requires_grad_()
    cos, sin = (randn(1, 512, width, dtype=dtype) for _ in range(2))
    results = []
    for turn in (rotary, apply_rotary_pos_emb):
        outputs = turn(q, k, cos, sin)
        grads = [output.detach().flip(1) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, (q, k), grads)])
    assert all(map(torch.equal, *results))
