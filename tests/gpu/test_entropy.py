"""Rows of logits at the sizes of real vocabularies."""

import pytest
import torch
from on_gpu import (
    BF16,
    DEVICE,
    EPS_32,
    FP16,
    FP32,
    blocks,
    need_gib,
    poisoned,
    randn,
    smallest_step,
)
from rows_truth import assert_rows, rows_truth
from tolerances import assert_no_worse
from torch import Tensor

from hfprune_fast.kernels import (
    linear_entropy,
    softmax_entropy,
    softmax_entropy_grad_,
    softmax_entropy_grad_reference,
)


def check_rows(
    entropy: Tensor, grad: Tensor, logits: Tensor, row_scale: Tensor, **transform: float
) -> None:
    for rows in blocks(len(logits)):
        z, scale = logits[rows], row_scale[rows]
        truth = rows_truth(z, **transform)
        assert_rows(entropy[rows], grad[rows], truth, "torch", scale, smallest_step(grad.dtype))
        # Row by row as well, where eager torch can: -inf makes NaN of its gradients.
        eager_h, eager_grad = softmax_entropy_grad_reference(z, scale, **transform)
        if eager_h.isfinite().all():
            # An exponent of the size of the logits is rounded before each exp, and so is a softcap.
            largest = max(float(z.abs().max()), transform.get("softcap", 0))
            true_grad, floor = scale.double()[:, None] * truth.grad, EPS_32 * (8 + 2 * largest)
            assert_no_worse(entropy[rows], eager_h, truth.value, floor=floor)
            assert_no_worse(grad[rows], eager_grad, true_grad, floor=floor)


@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 152064, 32001])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rows(vocab: int, dtype: torch.dtype) -> None:
    need_gib(20)
    logits = randn(8192 if dtype == BF16 else 1024, vocab, dtype=dtype, scale=3)
    row_scale = torch.rand(len(logits), device=DEVICE) + 0.5
    grad = logits.clone()
    with poisoned():
        entropy = softmax_entropy_grad_(grad, row_scale)
        leaf = logits.requires_grad_()
        functional = softmax_entropy(leaf)
        (functional_grad,) = torch.autograd.grad(functional, leaf, row_scale)
    logits = logits.detach()
    check_rows(entropy, grad, logits, row_scale)
    del grad
    check_rows(functional.detach(), functional_grad, logits, row_scale)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocab", [128256, 32001])
def test_masked_logits_and_transforms(
    vocab: int, softcap: float | None, dtype: torch.dtype
) -> None:
    logits = randn(300, vocab, dtype=dtype, scale=3)
    logits[:, vocab - 300 :] = -torch.inf
    logits[torch.rand(300, vocab, device=DEVICE) < 0.3] = -torch.inf
    logits[0] = -torch.inf
    logits[1], logits[1, 77] = -torch.inf, 2.0
    logits[2, : vocab // 2] = -torch.inf  # the first steps of the pass see no finite logit
    row_scale = torch.rand(300, device=DEVICE) + 0.5
    row_scale[3] = 0
    options = {} if softcap is None else {"softcap": softcap, "logit_scale": 0.5}
    grad = logits.clone()
    entropy = softmax_entropy_grad_(grad, row_scale, **options)
    assert entropy[:2].tolist() == [0, 0]
    assert (grad[logits == -torch.inf] == 0).all()
    assert (grad[3] == 0).all()
    check_rows(entropy, grad, logits, row_scale, **options)


def test_rows_past_two_to_the_31_elements() -> None:
    need_gib(12)
    tokens, vocab = 17_000, 152_064
    logits = randn(tokens, vocab, scale=3)
    row_scale = torch.rand(tokens, device=DEVICE) + 0.5
    boundary = 2**31 // vocab
    some = [slice(0, 8), slice(boundary - 8, boundary + 8), slice(tokens - 8, tokens)]
    before = [logits[rows].clone() for rows in some]
    entropy = softmax_entropy_grad_(logits, row_scale)
    assert entropy.isfinite().all()
    assert all(logits[rows].isfinite().all() for rows in blocks(tokens))
    for rows, z in zip(some, before, strict=True):
        check_rows(entropy[rows], logits[rows], z, row_scale[rows])


def test_rows_at_an_odd_address() -> None:
    """A slice that starts 2 bytes off 16: narrow loads, and the same result bit for bit."""
    logits = randn(16, 32_000, scale=3)
    row_scale = torch.rand(16, device=DEVICE)
    shifted = torch.empty(logits.numel() + 1, dtype=BF16, device=DEVICE)[1:].view_as(logits)
    shifted.copy_(logits)
    entropy = softmax_entropy_grad_(logits, row_scale)
    assert torch.equal(softmax_entropy_grad_(shifted, row_scale), entropy)
    assert torch.equal(shifted, logits)


def test_vocabulary_masked_with_the_least_finite_number() -> None:
    logits = randn(16, 128_256, scale=3)
    masked = logits.clone()
    logits[:, :100_000], masked[:, :100_000] = torch.finfo(BF16).min, -torch.inf
    assert torch.equal(softmax_entropy(logits), softmax_entropy(masked))


def test_kernels_run_on_the_current_stream() -> None:
    logits = randn(64, 128_256, scale=3)
    expected = softmax_entropy(logits)
    stream, late = torch.cuda.Stream(), torch.zeros_like(logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(logits)
        entropy = softmax_entropy(late)
    stream.synchronize()
    assert torch.equal(entropy, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    hidden, weight = randn(64, 256), randn(32_000, 256, scale=0.2)
    expected = linear_entropy(hidden, weight)
    got = linear_entropy(hidden.to("cuda:1"), weight.to("cuda:1"))
    assert got[1].device == torch.device("cuda:1")
    assert torch.equal(got[0].cpu(), expected[0].cpu())
    assert torch.equal(got[1].cpu(), expected[1].cpu())
