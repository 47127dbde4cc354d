"""RMS norm and rotary embedding, forward and backward, beside transformers' arithmetic.

    .venv/bin/pytest bench/kernels/bench_norms.py --tiny

    rms_norm    (T, D) x and gradient, (D,) weight -> y, d_x           5 numbers an element
    rotary      (1, D / 128, T, 128) q, k and gradients, cos and sin   4 numbers an element

On a GPU alone: elsewhere ours is transformers' arithmetic too. The floor is a copy of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from case import Case, Results, providers
from meter import DEVICE
from shapes import Spec
from torch import Tensor

from hfprune_fast.kernels import rms_norm, rms_norm_reference, rotary, rotary_reference

EPS = 1e-5
HEAD = 128


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, eps=EPS)


class Norm(Case):
    """Llama's norm of hidden states, whose weight is frozen."""

    EAGER = {"RMS norm": eager_norm}  # noqa: RUF012 - never changed
    letters, dtypes, small, computes = "TD", ("bfloat16",), (), "RMS norm"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        shape = spec.sizes["T"], spec.sizes["D"]
        self.x, self.grad = self.normal(*shape), self.normal(*shape)
        self.weight = self.normal(shape[1])
        self.bytes_moved = 5 * self.x.nbytes
        self.summed = shape[1]

    def truth(self, computes: str) -> Results:
        return through(eager_norm, self.grad.double(), self.x.double(), self.weight.double())

    def run(self, norm: Callable[..., Tensor]) -> Results:
        return through(norm, self.grad, self.x, self.weight)

    def own(self, backend: str) -> Results:
        return self.run(lambda x, weight: rms_norm(x, weight, eps=EPS, backend=backend))


def through(norm: Callable[..., Tensor], grad: Tensor, x: Tensor, weight: Tensor) -> Results:
    """Return the norm of x, and the gradient there."""
    x = x.detach().requires_grad_()
    y = norm(x, weight)
    return {"y": y.detach(), "d_x": torch.autograd.grad(y, x, grad)[0]}


class Rotary(Case):
    """Llama's rotary embedding of as many keys as queries, and its backward pass."""

    EAGER = {"rotary": rotary_reference}  # noqa: RUF012
    letters, dtypes, small, computes = "TD", ("bfloat16",), (), "rotary"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        tokens, heads = spec.sizes["T"], max(1, spec.sizes["D"] // HEAD)
        shape = 1, tokens, heads, HEAD
        # Views, as a projection's output is seen.
        self.q, self.k, *self.grads = (self.normal(*shape).transpose(1, 2) for _ in range(4))
        angles = torch.rand(1, tokens, HEAD, device=DEVICE) * 6.3
        self.tables = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        self.bytes_moved = 2 * 4 * self.q.nbytes

    def turned(self, turn: Callable[..., tuple[Tensor, Tensor]], to: torch.dtype) -> Results:
        q, k = (tensor.detach().to(to).requires_grad_() for tensor in (self.q, self.k))
        out = turn(q, k, *(table.to(to) for table in self.tables))
        back = torch.autograd.grad(out, (q, k), [grad.to(to) for grad in self.grads])
        names = ("q", "k", "d_q", "d_k")
        return {n: t.detach() for n, t in zip(names, (*out, *back), strict=True)}

    def truth(self, computes: str) -> Results:
        return self.turned(rotary_reference, torch.float64)

    def run(self, turn: Callable[..., tuple[Tensor, Tensor]]) -> Results:
        return self.turned(turn, self.dtype)

    def own(self, backend: str) -> Results:
        return self.run(lambda q, k, cos, sin: rotary(q, k, cos, sin, backend=backend))


Norm.PROVIDERS = providers(Norm.own, eager_norm, None)
Rotary.PROVIDERS = providers(Rotary.own, rotary_reference, None)
CASES = {"rms_norm": Norm, "rotary": Rotary}


def test_norms(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
