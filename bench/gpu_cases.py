"""Every operation at the shapes of real models: what to time, and the floor of each.

A floor is a time that no version beats by much: the bytes that the operation must move over the
bandwidth of a copy, or for `linear_entropy` its two matrix products alone, in the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu_timer import DEVICE, Tensors, size
from torch import Tensor

from hfprune_fast.kernels import (
    gated_taylor,
    linear_entropy,
    linear_entropy_reference,
    softmax_entropy,
    softmax_entropy_grad_,
    softmax_entropy_grad_reference,
    taylor_statistics,
)
from hfprune_fast.kernels._activations import eager_gated
from hfprune_fast.kernels.linear_entropy import _Buffers, _product, _product_back

BF16 = torch.bfloat16
# What cuBLAS may take for itself in a call, beside what linear_entropy promises.
WORKSPACE_BYTES = 64 << 20


@dataclass
class Case:
    """An operation at one shape: providers to time, and what to hold their times against."""

    op: str
    shape: str
    ours: Callable[[], Tensors]
    plain: Callable[[], Tensors]  # the torch backend: ours is checked against it, on fresh inputs
    eager: Callable[[], object] | None
    refill: Callable[[], object] = lambda: None  # before each call, outside its time
    floor_bytes: int = 0
    gemms: Callable[[], object] | None = None  # the floor, where it is not bytes
    flops: int = 0
    least_bytes: int = 0  # of a kernel that finds all second reads in the L2 cache
    extra_bytes_limit: int = 0
    target_percent: float | None = None


def random_logits(tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    """(T, V) bf16 of standard deviation 3, and a scale of each row."""
    logits = torch.randn(tokens, vocab, dtype=BF16, device=DEVICE).mul_(3)
    return logits, torch.rand(tokens, device=DEVICE) + 0.5


def eager_entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def entropy_forward(vocab: int) -> Case:
    logits, _ = random_logits(size(8192), size(vocab))
    return Case(
        "softmax_entropy", f"{size(8192)} x {size(vocab)}",
        ours=lambda: (softmax_entropy(logits, backend="triton"),),
        plain=lambda: (softmax_entropy(logits, backend="torch"),),
        eager=lambda: eager_entropy(logits),
        floor_bytes=logits.nbytes,
    )  # fmt: skip


def entropy_backward(vocab: int) -> Case:
    logits, d_entropy = random_logits(size(8192), size(vocab))
    leaf = logits.requires_grad_()

    def backward(forward: Callable[[Tensor], Tensor]) -> Callable[[], Tensors]:
        output: list[Tensor] = []  # made by the first call, which is not timed

        def call() -> Tensors:
            if not output:
                output.append(forward(leaf))
            return torch.autograd.grad(output[0], leaf, d_entropy, retain_graph=True)

        return call

    return Case(
        "softmax_entropy backward", f"{size(8192)} x {size(vocab)}",
        ours=backward(partial(softmax_entropy, backend="triton")),
        plain=backward(partial(softmax_entropy, backend="torch")),
        eager=backward(eager_entropy),
        floor_bytes=3 * logits.nbytes, least_bytes=2 * logits.nbytes,
    )  # fmt: skip


def entropy_grad(vocab: int, *, tokens: int = 8192, target_percent: float | None = None) -> Case:
    logits, row_scale = random_logits(size(tokens), size(vocab))
    buffer = torch.empty_like(logits)

    def run(target: Tensor, backend: str) -> Tensors:
        return softmax_entropy_grad_(target, row_scale, backend=backend), target

    return Case(
        "softmax_entropy_grad_", f"{size(tokens)} x {size(vocab)}",
        ours=lambda: run(buffer, "triton"),
        plain=lambda: run(logits.clone(), "torch"),
        eager=lambda: softmax_entropy_grad_reference(logits, row_scale),
        refill=lambda: buffer.copy_(logits),
        floor_bytes=3 * logits.nbytes, least_bytes=2 * logits.nbytes,
        target_percent=target_percent,
    )  # fmt: skip


def head(
    width: int, vocab: int, *, fp32_logits: bool = False, target_percent: float | None = None
) -> Case:
    tokens, width, vocab = size(8192), size(width), size(vocab)
    hidden = torch.randn(tokens, width, dtype=BF16, device=DEVICE)
    weight = torch.randn(vocab, width, dtype=BF16, device=DEVICE).mul_(3 / width**0.5)
    row_weight = (torch.rand(tokens, device=DEVICE) + 0.5) / tokens
    buffers = _Buffers.allocate(hidden, weight, fp32_logits, None)
    buffers.d_logits.normal_()
    d_hidden = torch.empty_like(hidden)
    inputs = hidden, weight, row_weight
    run = partial(linear_entropy, *inputs, fp32_logits=fp32_logits)

    def gemms() -> None:
        chunk = len(buffers.logits)
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            logits, d_logits = (b[: rows.stop - start] for b in (buffers.logits, buffers.d_logits))
            _product(hidden[rows], weight, None, logits, buffers.tile)
            _product_back(d_logits, weight, d_hidden[rows], 1.0, buffers.tile)

    budget = max(256 << 20, 512 * vocab * (6 if fp32_logits else 2))
    return Case(
        "linear_entropy fp32" if fp32_logits else "linear_entropy",
        f"{tokens} x {width} x {vocab}",
        ours=lambda: run(backend="triton"),
        plain=lambda: run(backend="torch"),
        eager=None if fp32_logits else partial(linear_entropy_reference, *inputs),
        gemms=gemms, flops=4 * tokens * width * vocab,
        extra_bytes_limit=budget + d_hidden.nbytes + WORKSPACE_BYTES,
        target_percent=target_percent,
    )  # fmt: skip


def eager_statistics(grad: Tensor, act: Tensor) -> Tensors:
    """The four sums as one would write them, in fp32 from bf16."""
    x, a = grad.float() * act.float(), act.float()
    sums = x.abs().sum((0, 1)), x.square().sum((0, 1)), x.sum(1).square().sum(0)
    return *sums, a.square().sum((0, 1))


def random_mlp(width: int, batch: int = 8, seq_len: int = 1024) -> tuple[str, Tensors]:
    shape = size(batch), size(seq_len), size(width)
    tensors = [torch.randn(shape, dtype=BF16, device=DEVICE) for _ in range(3)]
    tensors[0].mul_(0.01)
    return f"{shape[0] * shape[1]} x {shape[2]}", tuple(tensors)


def statistics_only(width: int) -> Case:
    shape, (grad, act, _) = random_mlp(width)
    return Case(
        "taylor_statistics", shape,
        ours=lambda: taylor_statistics(grad, act, backend="triton"),
        plain=lambda: taylor_statistics(grad, act, backend="torch"),
        eager=lambda: eager_statistics(grad, act),
        floor_bytes=2 * grad.nbytes,
    )  # fmt: skip


def gated(
    width: int, *, batch: int = 8, seq_len: int = 1024, target_percent: float | None = None
) -> Case:
    shape, (grad, gate, up) = random_mlp(width, batch, seq_len)
    buffers = torch.empty_like(gate), torch.empty_like(up)

    def run(tensors: Tensors, backend: str) -> Tensors:
        sums, d_gate, d_up = gated_taylor(grad, *tensors, overwrite=True, backend=backend)
        return *sums, d_gate, d_up

    def eager() -> None:
        act, _, _ = eager_gated(grad, gate, up, "silu")
        eager_statistics(grad, act)

    return Case(
        "gated_taylor", shape,
        ours=lambda: run(buffers, "triton"),
        plain=lambda: run((gate.clone(), up.clone()), "torch"),
        eager=eager,
        refill=lambda: (buffers[0].copy_(gate), buffers[1].copy_(up)),
        floor_bytes=5 * grad.nbytes, target_percent=target_percent,
    )  # fmt: skip


def cases() -> Iterator[Callable[[], Case]]:
    """What has a target first, so that a budget that runs out loses the rest."""
    yield partial(entropy_grad, 128_256, target_percent=85)
    yield partial(head, 4096, 128_256, target_percent=100 / 1.15)
    yield partial(gated, 14_336, target_percent=85)
    yield from (partial(entropy_forward, vocab) for vocab in (128_256, 32_000, 152_064))
    yield partial(entropy_backward, 128_256)
    yield from (partial(entropy_grad, vocab) for vocab in (32_000, 152_064))
    yield partial(head, 4096, 128_256, fp32_logits=True)
    yield from (partial(head, *sizes) for sizes in ((4096, 32_000), (3584, 152_064)))
    yield from (partial(statistics_only, width) for width in (14_336, 11_008, 18_944))
    yield from (partial(gated, width) for width in (11_008, 18_944))
