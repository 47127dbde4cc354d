"""Softmax entropy of logits, and gradients at logits, beside other ways to the same numbers.

    .venv/bin/pytest bench/kernels/bench_entropy.py --small

    softmax_entropy        (T, V) logits -> (T,) H                reads each logit
    softmax_entropy_grad   -> (T,) H and (T, V) row_scale · dH/dlogits     reads and writes each
    cross_entropy_grad, fisher_grad    the same of given labels, and of labels drawn from softmax
                                       (at full and tiny scale)

The floor is a copy of as many bytes: 1 or 2 times those of the logits. A GPU kernel whose row does
not stay in the cache between its two reads moves 3 for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from case import Case, Results, by, ours, providers, spread_rows
from hfprune_reference import entropy_of
from shapes import Spec
from torch import Tensor
from torch.nn import functional

from hfprune_fast.kernels import softmax_entropy, softmax_entropy_grad_
from hfprune_fast.kernels._criterion import Criterion
from hfprune_fast.kernels._rows import rows_loss_and_grad


def eager_entropy(logits: Tensor) -> Tensor:
    """Return H as most would write it: fp32 from the logits' dtype, and log p whole."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return -(log_p.exp() * log_p).sum(dim=-1)


def eager_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def fp64_rows(logits: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return H, or the cross entropy of labels, and its gradient; all logits are finite."""
    p = torch.softmax(logits.double(), dim=-1)
    if labels is None:
        log_p = p.log()
        entropy = -(p * log_p).sum(dim=-1)
        return entropy, -p * (log_p + entropy[:, None])
    losses = -p.gather(1, labels[:, None]).log()
    return losses[:, 0], p.scatter_add(1, labels[:, None], -torch.ones_like(losses))


class Rows(Case):
    """The value of each row; for the operations on gradients also that times a scale of the row."""

    EAGER = {  # noqa: RUF012 - never changed
        "entropy": eager_entropy, "cross_entropy": eager_cross_entropy,
        "fisher": eager_cross_entropy,
    }  # fmt: skip
    letters, small_tokens = "TV", 256
    labels: Tensor | None = None

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.logits = self.normal(spec.sizes["T"], spec.sizes["V"], std=3.0)
        self.bytes_moved = self.logits.nbytes
        self.rows = spread_rows(spec.sizes["T"])
        self.summed = spec.sizes["V"]

    def truth(self, computes: str) -> Results:
        return {"loss": fp64_rows(self.logits[self.rows])[0]}

    def sampled(self, results: Results) -> Results:
        return {name: result[self.rows] for name, result in results.items()}

    def run(self, entropy: Callable[..., Tensor]) -> Results:
        return {"loss": entropy(self.logits)}

    def own(self, backend: str) -> Results:
        return {"loss": softmax_entropy(self.logits, backend=backend)}


class RowGrad(Rows):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.bytes_moved *= 2
        self.row_scale = torch.rand(len(self.logits), device=self.logits.device) + 0.5
        self.buffer = self.logits.clone()
        self.keys: Tensor | None = None
        if self.computes == "cross_entropy":
            self.labels = self.keys = self.integers(*self.logits.shape)
        elif self.computes == "fisher":
            # The truth takes the labels that the torch path draws: where the gradient is negative.
            self.keys = torch.arange(len(self.logits), device=self.logits.device)
            self.labels = self.own("torch")["d_logits"].argmin(dim=1)

    def refill(self) -> None:
        self.buffer.copy_(self.logits)

    def truth(self, computes: str) -> Results:
        labels = None if self.labels is None else self.labels[self.rows]
        loss, grad = fp64_rows(self.logits[self.rows], labels)
        return {"loss": loss, "d_logits": grad * self.row_scale[self.rows, None]}

    def run(self, loss: Callable[..., Tensor]) -> Results:
        leaf = self.logits.detach().requires_grad_()
        made = loss(leaf) if self.labels is None else loss(leaf, self.labels)
        (grad,) = torch.autograd.grad(made, leaf, self.row_scale.to(made.dtype))
        return {"loss": made.detach(), "d_logits": grad}

    def own(self, backend: str) -> Results:
        if self.computes == "entropy":
            loss = softmax_entropy_grad_(self.buffer, self.row_scale, backend=backend)
        else:
            loss = rows_loss_and_grad(
                self.buffer, self.row_scale, self.buffer, Criterion(self.computes, self.keys),
                softcap=None, logit_scale=1.0, backend=backend,
            )  # fmt: skip
        return {"loss": loss, "d_logits": self.buffer}


class RowCrossEntropy(RowGrad):
    computes = "cross_entropy"
    dtypes, small = ("bfloat16",), ()
    PROVIDERS = providers(RowGrad.own, eager_cross_entropy, None)


class RowFisher(RowGrad):
    computes = "fisher"
    dtypes, small = ("bfloat16",), ()


RowFisher.PROVIDERS = {
    f"ours, {name}": ours(RowGrad.own, name) for name in ("torch", "cpp", "triton")
}
Rows.PROVIDERS = providers(Rows.own, eager_entropy, entropy_of)
RowGrad.PROVIDERS = providers(RowGrad.own, eager_entropy, entropy_of) | {
    "ours, by autograd": by(lambda case: case.run(softmax_entropy))
}
CASES = {
    "softmax_entropy": Rows,
    "softmax_entropy_grad": RowGrad,
    "cross_entropy_grad": RowCrossEntropy,
    "fisher_grad": RowFisher,
}


def test_entropy(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
