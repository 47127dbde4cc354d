"""Softmax entropy of logits, and its gradient, beside what others do for the same numbers.

    .venv/bin/pytest bench/bench_entropy.py --small

    softmax_entropy        (T, V) logits -> (T,) H                reads each logit
    softmax_entropy_grad   -> (T,) H and (T, V) row_scale · dH/dlogits     reads and writes each

The floor is a copy of as many bytes: 1 or 2 times those of the logits. A GPU kernel whose row does
not stay in the cache between its two reads moves 3 for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from baselines.hfprune_reference import entropy_of
from case import Case, Provider, Results, needs_triton, spread_rows
from shapes import Spec, of_models
from torch import Tensor

from hfprune_fast.kernels import softmax_entropy, softmax_entropy_grad_

Entropy = Callable[[Tensor], Tensor]


def eager_entropy(logits: Tensor) -> Tensor:
    """As most would write it: fp32 from the logits' dtype, and log p whole."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return -(log_p.exp() * log_p).sum(dim=-1)


def fp64_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """H and dH/dlogits from p itself; for the logits that a test makes, which are all finite."""
    p = torch.softmax(logits.double(), dim=-1)
    log_p = p.log()
    entropy = -(p * log_p).sum(dim=-1)
    return entropy, -p * (log_p + entropy[:, None])


def compiled(entropy: Entropy) -> Entropy:
    torch._dynamo.reset()  # or it would give up on compiling after some shapes
    return torch.compile(entropy, dynamic=False)


class RowEntropy(Case):
    """H of each row."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.logits = self.normal(spec.sizes["T"], spec.sizes["V"], std=3.0)
        self.bytes_moved = self.logits.nbytes
        self.rows = spread_rows(spec.sizes["T"])
        self.summed = spec.sizes["V"]

    def truth(self, computes: str) -> Results:
        return {"entropy": fp64_entropy(self.logits[self.rows])[0]}

    def plain(self, computes: str) -> Results:
        return {"entropy": eager_entropy(self.logits[self.rows])}

    def sampled(self, results: Results) -> Results:
        return {name: result[self.rows] for name, result in results.items()}

    @staticmethod
    def by(entropy: Entropy) -> Callable[[RowEntropy], Callable[[], Results]]:
        return lambda case: lambda: {"entropy": entropy(case.logits)}

    @staticmethod
    def ours(backend: str) -> Provider:
        def make(case: RowEntropy) -> Callable[[], Results]:
            if backend == "triton":
                needs_triton()
            return lambda: {"entropy": softmax_entropy(case.logits, backend=backend)}

        return Provider(make)


class RowEntropyGrad(RowEntropy):
    """H of each row and its gradient, times a scale of the row."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.bytes_moved = 2 * self.logits.nbytes
        self.row_scale = self.uniform(spec.sizes["T"])
        self.buffer = self.logits.clone()

    def refill(self) -> None:
        self.buffer.copy_(self.logits)

    def truth(self, computes: str) -> Results:
        entropy, grad = fp64_entropy(self.logits[self.rows])
        return {"entropy": entropy, "d_logits": grad * self.row_scale[self.rows, None]}

    def plain(self, computes: str) -> Results:
        return differentiated(eager_entropy, self.logits[self.rows], self.row_scale[self.rows])

    @staticmethod
    def by(entropy: Entropy) -> Callable[[Any], Callable[[], Results]]:
        return lambda case: lambda: differentiated(entropy, case.logits, case.row_scale)

    @staticmethod
    def ours(backend: str) -> Provider:
        def make(case: RowEntropyGrad) -> Callable[[], Results]:
            if backend == "triton":
                needs_triton()

            def call() -> Results:
                entropy = softmax_entropy_grad_(case.buffer, case.row_scale, backend=backend)
                return {"entropy": entropy, "d_logits": case.buffer}

            return call

        return Provider(make)

    @staticmethod
    def ours_by_autograd(case: RowEntropyGrad) -> Callable[[], Results]:
        """softmax_entropy, for those who differentiate through it, on the path of this device."""
        return RowEntropyGrad.by(softmax_entropy)(case)


def differentiated(entropy: Entropy, logits: Tensor, row_scale: Tensor) -> Results:
    leaf = logits.detach().requires_grad_()
    made = entropy(leaf)
    (grad,) = torch.autograd.grad(made, leaf, row_scale.to(made.dtype))
    return {"entropy": made.detach(), "d_logits": grad}


def providers(case: type[RowEntropy]) -> dict[str, Provider]:
    return {
        "ours, torch": case.ours("torch"),
        "ours, triton": case.ours("triton"),
        "HFPrune's arithmetic": Provider(case.by(entropy_of)),
        "eager": Provider(case.by(eager_entropy)),
        "torch.compile": Provider(lambda made: case.by(compiled(eager_entropy))(made)),
    }


RowEntropy.PROVIDERS = providers(RowEntropy)
RowEntropyGrad.PROVIDERS = providers(RowEntropyGrad) | {
    "ours, by autograd": Provider(RowEntropyGrad.ours_by_autograd)
}
CASES = {"softmax_entropy": RowEntropy, "softmax_entropy_grad": RowEntropyGrad}


def specs(scale: str) -> Iterator[Spec]:
    for op in CASES:
        small = ("Llama-2-7B", "Llama-3.1-8B")
        yield from of_models(op, scale, "TV", small_tokens=256, small=small)


def test_entropy(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
