"""A language-model head, its entropy and the gradient at its input, beside fused cross entropies.

    .venv/bin/pytest bench/kernels/bench_linear_entropy.py --small

    (T, D) hidden, (V, D) frozen weight -> mean H, (T, D) dH/dhidden           4·T·D·V FLOPs

Liger, Cut Cross Entropy and torch's linear_cross_entropy compute the cross entropy of given labels
(`computes`), which cannot be turned into an entropy: they stand beside it because the products and
the memory are those of the same shape. They are checked against cross entropy. The floor is the two
products alone, in the chunks that ours takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_entropy import eager_cross_entropy, eager_entropy, fp64_rows
from case import AbsentError, Case, Provider, Results, needs_triton, ours, providers, spread_rows
from hfprune_reference import entropy_of
from meter import GPU
from shapes import Spec
from torch import Tensor
from torch.nn.functional import linear

from hfprune_fast.kernels import linear_entropy
from hfprune_fast.kernels._head import Head as Inputs
from hfprune_fast.kernels._head import Products, products_of

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels -> mean
TRUTH_ROWS = 64  # of logits that the truth makes at a time, in fp64
# Cut Cross Entropy leaves out blocks of the gradient in which all p are below 2^-12 (bf16's eps /
# 32): 2.8 % of its norm in a simulation at V = 128256.
FILTERED = 0.05


def mean_of(entropy: Callable[[Tensor], Tensor]) -> Loss:
    return lambda hidden, weight, _: entropy(linear(hidden, weight)).mean()


def cross_entropy_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eager_cross_entropy(linear(hidden, weight), labels).mean()


class Head(Case):
    """Hidden states of a size that makes logits of standard deviation 3, and labels."""

    EAGER = {"entropy": mean_of(eager_entropy), "cross entropy": cross_entropy_loss}  # noqa: RUF012
    floor_name = "products"
    letters, small_tokens, small = "TDV", 48, ("Llama-2-7B", "Qwen3-0.6B")

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        tokens, width, vocab = (spec.sizes[letter] for letter in "TDV")
        self.hidden = self.normal(tokens, width)
        self.weight = self.normal(vocab, width, std=3 / width**0.5)
        self.target = self.integers(tokens, vocab)
        self.rows = spread_rows(tokens)
        self.summed, self.inner_dtype = vocab, self.dtype  # of the logits
        self.flops = 4 * tokens * width * vocab
        self.bytes_moved = 2 * self.hidden.nbytes + self.weight.nbytes

    def products(self) -> tuple[int, Products]:
        """Return the rows of a chunk of ours, and the products in its buffers."""
        inputs = Inputs(self.hidden, self.weight)
        rows, (products,) = products_of([inputs], False, None, "triton" if GPU else "torch")
        return rows, products

    def floor(self) -> None:
        chunk, products = self.products()
        d_hidden = torch.empty_like(self.hidden)
        for start in range(0, len(self.hidden), chunk):
            rows = slice(start, start + chunk)
            products.back(products.logits(rows), d_hidden[rows], 1.0)

    def truth(self, computes: str) -> Results:
        weight, scale = self.weight.double(), 1 / len(self.hidden)

        def fp64(rows: Tensor) -> tuple[Tensor, Tensor]:
            labels = None if computes == "entropy" else self.target[rows]
            return fp64_rows(self.hidden[rows].double() @ weight.t(), labels)

        each = torch.arange(len(self.hidden), device=weight.device).split(TRUTH_ROWS)
        loss = torch.stack([fp64(rows)[0].sum() for rows in each]).sum()
        return {"loss": loss * scale, "d_hidden": scale * fp64(self.rows)[1] @ weight}

    def sampled(self, results: Results) -> Results:
        return results | {"d_hidden": results["d_hidden"][self.rows]}

    def run(self, loss: Loss) -> Results:
        hidden = self.hidden.detach().requires_grad_()
        made = loss(hidden, self.weight, self.target)
        return {"loss": made.detach(), "d_hidden": torch.autograd.grad(made, hidden)[0]}

    def own(self, backend: str, fp32_logits: bool = False) -> Results:
        if fp32_logits and self.dtype == torch.float32:
            raise AbsentError("the logits of a float32 head are float32")
        loss, d_hidden = linear_entropy(
            self.hidden, self.weight, fp32_logits=fp32_logits, backend=backend
        )
        return {"loss": loss, "d_hidden": d_hidden}


def peer(load: Callable[[Head], Loss], more_error: float = 0.0) -> Provider:
    """Return a fused cross entropy; load() imports it, or raises AbsentError."""
    return Provider(lambda case: partial(case.run, load(case)), "cross entropy", more_error)


def imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        raise AbsentError(f"{module.split('.')[0]} is not installed") from None


def liger(case: Head) -> Loss:
    needs_triton()
    name = "liger_fused_linear_cross_entropy"
    return imported("liger_kernel.transformers.functional", name)


def cut_cross_entropy(filter_eps: str | None, case: Head) -> Loss:
    needs_triton(interpreted=False)  # which multiplies bfloat16 wrongly
    if case.dtype == torch.float32:
        raise AbsentError("its gradients are for bfloat16 and float16")
    function = imported("cut_cross_entropy", "linear_cross_entropy")
    return partial(function, filter_eps=filter_eps)


def torch_linear_cross_entropy(case: Head) -> Loss:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise AbsentError(f"torch {torch.__version__} has no linear_cross_entropy")
    # In the chunks that ours takes: of few tokens it would choose chunks of one row each, and its
    # bf16 loss, a sum over the chunks in bf16, was then off by 8 %.
    rows, _ = case.products()
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
    return partial(function, options=options)


Head.PROVIDERS = providers(Head.own, mean_of(eager_entropy), mean_of(entropy_of)) | {
    "ours, triton, fp32 logits": ours(partial(Head.own, fp32_logits=True), "triton"),
    "Liger": peer(liger),
    "Cut Cross Entropy": peer(partial(cut_cross_entropy, "high"), more_error=FILTERED),
    "Cut Cross Entropy, unfiltered": peer(partial(cut_cross_entropy, None)),
    "torch linear_cross_entropy": peer(torch_linear_cross_entropy),
}
CASES = {"linear_entropy": Head}


def test_linear_entropy(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
