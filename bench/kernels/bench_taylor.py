"""The backward pass of a gated MLP's act with its neurons' statistics, beside plain torch.

    .venv/bin/pytest bench/kernels/bench_taylor.py --small

    gated_taylor        (B, S, F) grad, gate, up -> d_gate, d_up, statistics    5 numbers an element
    taylor_statistics   (B, S, F) grad, act      -> statistics                  2

Statistics are l1 Σ|x|, l2 Σx², fisher_mask Σ_seq (Σ_t x)² and act Σa², with x = grad · act;
HFPrune's arithmetic makes l1 alone, rounded to the dtype. The floor is a copy of as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from case import Case, Results, providers
from shapes import Spec
from torch import Tensor
from torch.nn import functional

from hfprune_fast.kernels import gated_taylor, taylor_statistics

SEQUENCES = 2


def sums(grad: Tensor, act: Tensor) -> Results:
    """Return the four statistics, in the dtype of the arguments."""
    x = grad * act
    return {
        "l1": x.abs().sum((0, 1)),
        "l2": x.square().sum((0, 1)),
        "fisher_mask": x.sum(1).square().sum(0),
        "act": act.square().sum((0, 1)),
    }


def eager_statistics(grad: Tensor, act: Tensor) -> Results:
    """Return the four sums as one would write them, in fp32 from bf16."""
    return sums(grad.float(), act.float())


def reference_statistics(grad: Tensor, act: Tensor) -> Results:
    return {"l1": (act * grad).abs().sum(dim=(0, 1))}


def eager_gated(
    grad: Tensor, gate: Tensor, up: Tensor, statistics: Callable[..., Results] = eager_statistics
) -> Results:
    """Do as hooks on down_proj and autograd would: act again, then its gradients."""
    value = functional.silu(gate)
    d_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return statistics(grad, value * up) | {"d_gate": d_gate, "d_up": grad * value}


class Statistics(Case):
    """The statistics of (grad, act)."""

    EAGER = {"entropy": eager_statistics}  # noqa: RUF012 - never changed
    letters, small_tokens = "TF", 1024
    inputs = 1  # beside grad
    numbers = 2  # read and written an element

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        shape = SEQUENCES, spec.sizes["T"] // SEQUENCES, spec.sizes["F"]
        self.grad = self.normal(*shape, std=0.01)
        self.pristine = [self.normal(*shape) for _ in range(self.inputs)]
        self.buffers = [tensor.clone() for tensor in self.pristine]
        self.bytes_moved = self.numbers * self.grad.nbytes
        self.summed = spec.sizes["T"]

    def truth(self, computes: str) -> Results:
        return sums(self.grad.double(), self.pristine[0].double())

    def run(self, eager: Callable[..., Results]) -> Results:
        return eager(self.grad, *self.pristine)

    def own(self, backend: str) -> Results:
        return taylor_statistics(self.grad, *self.pristine, backend=backend)._asdict()


class Gated(Statistics):
    """The same with act = silu(gate) · up, and the gradients at gate and up."""

    EAGER = {"entropy": eager_gated}  # noqa: RUF012
    inputs, numbers = 2, 5

    def refill(self) -> None:
        for buffer, pristine in zip(self.buffers, self.pristine, strict=True):
            buffer.copy_(pristine)

    def truth(self, computes: str) -> Results:
        grad, gate, up = (t.double() for t in (self.grad, *self.pristine))
        sigmoid = 1 / (1 + torch.exp(-gate))
        value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))  # silu and its slope
        gradients = {"d_gate": grad * up * slope, "d_up": grad * value}
        return sums(grad, value * up) | gradients

    def own(self, backend: str) -> Results:
        statistics, d_gate, d_up = gated_taylor(
            self.grad, *self.buffers, overwrite=True, backend=backend
        )
        return statistics._asdict() | {"d_gate": d_gate, "d_up": d_up}


Statistics.PROVIDERS = providers(Statistics.own, eager_statistics, reference_statistics)
reference_gated = partial(eager_gated, statistics=reference_statistics)
Gated.PROVIDERS = providers(Gated.own, eager_gated, reference_gated)
CASES = {"gated_taylor": Gated, "taylor_statistics": Statistics}


def test_taylor(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
