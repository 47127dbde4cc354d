"""The backward pass of a gated MLP's act with its neurons' statistics, beside plain torch.

    .venv/bin/pytest bench/bench_taylor.py --small

    gated_taylor        (B, S, F) grad, gate, up -> d_gate, d_up, statistics    5 numbers an element
    taylor_statistics   (B, S, F) grad, act      -> statistics                  2

Statistics are l1 Σ|x|, l2 Σx², mask Σ_seq (Σ_t x)² and act Σa², with x = grad · act; HFPrune's
arithmetic makes l1 alone, rounded to the dtype. The floor is a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from bench_entropy import compiled
from case import Case, Provider, Results, needs_triton
from shapes import Spec, of_models
from torch import Tensor
from torch.nn import functional

from hfprune_fast.kernels import gated_taylor, taylor_statistics

SEQUENCES = 2
Eager = Callable[..., Results]


def eager_statistics(grad: Tensor, act: Tensor) -> Results:
    """The four sums as one would write them, in fp32 from bf16."""
    x, a = grad.float() * act.float(), act.float()
    return {
        "l1": x.abs().sum((0, 1)),
        "l2": x.square().sum((0, 1)),
        "mask": x.sum(1).square().sum(0),
        "act": a.square().sum((0, 1)),
    }


def reference_statistics(grad: Tensor, act: Tensor) -> Results:
    return {"l1": (act * grad).abs().sum(dim=(0, 1))}


def fp64_statistics(grad: Tensor, act: Tensor) -> Results:
    x = grad.double() * act
    return {
        "l1": x.abs().sum((0, 1)),
        "l2": (x * x).sum((0, 1)),
        "mask": (x.sum(1) ** 2).sum(0),
        "act": (act * act).sum((0, 1)),
    }


class Statistics(Case):
    """The statistics of (grad, act)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        shape = SEQUENCES, spec.sizes["T"] // SEQUENCES, spec.sizes["F"]
        self.grad, self.act = self.normal(*shape, std=0.01), self.normal(*shape)
        self.bytes_moved = 2 * self.grad.nbytes
        self.summed = spec.sizes["T"]

    def truth(self, computes: str) -> Results:
        return fp64_statistics(self.grad, self.act.double())

    def plain(self, computes: str) -> Results:
        return eager_statistics(self.grad, self.act)

    @staticmethod
    def by(statistics: Eager) -> Callable[[Statistics], Callable[[], Results]]:
        return lambda case: lambda: statistics(case.grad, case.act)

    @staticmethod
    def ours(backend: str) -> Callable[[Statistics], Callable[[], Results]]:
        def make(case: Statistics) -> Callable[[], Results]:
            if backend == "triton":
                needs_triton()
            return lambda: taylor_statistics(case.grad, case.act, backend=backend)._asdict()

        return make


class Gated(Case):
    """The same with act = silu(gate) · up, and the gradients at gate and up."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        shape = SEQUENCES, spec.sizes["T"] // SEQUENCES, spec.sizes["F"]
        self.grad = self.normal(*shape, std=0.01)
        self.gate, self.up = self.normal(*shape), self.normal(*shape)
        self.buffers = self.gate.clone(), self.up.clone()
        self.bytes_moved = 5 * self.grad.nbytes
        self.summed = spec.sizes["T"]

    def refill(self) -> None:
        for buffer, pristine in zip(self.buffers, (self.gate, self.up), strict=True):
            buffer.copy_(pristine)

    def truth(self, computes: str) -> Results:
        gate, up, grad = self.gate.double(), self.up.double(), self.grad.double()
        value = gate / (1 + torch.exp(-gate))
        slope = value / gate * (1 + gate - value)  # of silu: σ (1 + z (1 - σ)), σ = silu(z) / z
        gradients = {"d_gate": grad * up * slope, "d_up": grad * value}
        return fp64_statistics(grad, value * up) | gradients

    def plain(self, computes: str) -> Results:
        return eager_gated(self.grad, self.gate, self.up, eager_statistics)

    @staticmethod
    def by(statistics: Eager, compile_it: bool = False) -> Callable[[Gated], Callable[[], Results]]:
        def make(case: Gated) -> Callable[[], Results]:
            function = compiled(eager_gated) if compile_it else eager_gated
            return lambda: function(case.grad, case.gate, case.up, statistics)

        return make

    @staticmethod
    def ours(backend: str) -> Callable[[Gated], Callable[[], Results]]:
        def make(case: Gated) -> Callable[[], Results]:
            if backend == "triton":
                needs_triton()

            def call() -> Results:
                statistics, d_gate, d_up = gated_taylor(
                    case.grad, *case.buffers, overwrite=True, backend=backend
                )
                return statistics._asdict() | {"d_gate": d_gate, "d_up": d_up}

            return call

        return make


def eager_gated(grad: Tensor, gate: Tensor, up: Tensor, statistics: Eager) -> Results:
    """As hooks on down_proj and autograd would have it: act anew, then its gradients."""
    value = functional.silu(gate)
    act = value * up
    d_value = grad * up
    d_gate = torch.ops.aten.silu_backward(d_value, gate)
    return statistics(grad, act) | {"d_gate": d_gate, "d_up": grad * value}


Statistics.PROVIDERS = {
    "ours, torch": Provider(Statistics.ours("torch")),
    "ours, triton": Provider(Statistics.ours("triton")),
    "HFPrune's arithmetic": Provider(Statistics.by(reference_statistics)),
    "eager": Provider(Statistics.by(eager_statistics)),
    "torch.compile": Provider(lambda case: Statistics.by(compiled(eager_statistics))(case)),
}
Gated.PROVIDERS = {
    "ours, torch": Provider(Gated.ours("torch")),
    "ours, triton": Provider(Gated.ours("triton")),
    "HFPrune's arithmetic": Provider(Gated.by(reference_statistics)),
    "eager": Provider(Gated.by(eager_statistics)),
    "torch.compile": Provider(Gated.by(eager_statistics, compile_it=True)),
}
CASES = {"gated_taylor": Gated, "taylor_statistics": Statistics}


def specs(scale: str) -> Iterator[Spec]:
    for op in CASES:
        small = ("Llama-2-7B", "Llama-3.1-8B")
        yield from of_models(op, scale, "TF", small_tokens=1024, small=small)


def test_taylor(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
