"""KL of a student's head from a teacher's, and the gradient at its input, beside fused divergences.

    .venv/bin/pytest bench/kernels/bench_linear_kl.py --small

    (T, D) hidden of both, one (V, D) frozen weight -> mean KL, (T, D) dKL/dhidden     6·T·D·V FLOPs

All compute the same, at temperature 1: the generalised JSD of Liger and of TRL is KL(teacher ‖
student) at beta 0. Liger's chunked loss always makes the gradient of the weight too, and its fused
KL takes the teacher's probabilities, which are made for it here. TRL's row needs `pip install trl`,
whose own needs are many: it is not one of the `bench` extra. The floor is the three products alone,
in the chunks that ours takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_linear_entropy import TRUTH_ROWS, imported
from case import AbsentError, Case, Provider, Results, needs_triton, ours, providers, spread_rows
from meter import GPU
from shapes import Spec
from torch import Tensor
from torch.nn.functional import kl_div, linear

from hfprune_fast.kernels import linear_kl, linear_kl_loss
from hfprune_fast.kernels._head import Head, products_of

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, weight, and the teacher's


def eager(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    log_q = torch.log_softmax(linear(hidden, weight), dim=-1, dtype=torch.float32)
    log_p = torch.log_softmax(linear(teacher, teacher_weight), dim=-1, dtype=torch.float32)
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class Distillation(Case):
    """A student whose logits differ from the teacher's by about a third of their size, 3."""

    EAGER = {"KL": eager}  # noqa: RUF012
    computes, floor_name = "KL", "products"
    letters, small_tokens, small = "TDV", 48, ("Qwen3-0.6B",)

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        tokens, width, vocab = (spec.sizes[letter] for letter in "TDV")
        self.teacher = self.normal(tokens, width)
        self.hidden = self.teacher + self.normal(tokens, width, std=0.3)
        self.weight = self.normal(vocab, width, std=3 / width**0.5)
        self.rows = spread_rows(tokens)
        self.summed, self.inner_dtype = vocab, self.dtype  # of the logits
        self.flops = 6 * tokens * width * vocab
        self.bytes_moved = 3 * self.hidden.nbytes + self.weight.nbytes

    def floor(self) -> None:
        heads = [Head(hidden, self.weight) for hidden in (self.hidden, self.teacher)]
        chunk, products = products_of(heads, False, None, "triton" if GPU else "torch")
        d_hidden = torch.empty_like(self.hidden)
        for start in range(0, len(self.hidden), chunk):
            rows = slice(start, start + chunk)
            logits = [one.logits(rows) for one in products]
            products[0].back(logits[0], d_hidden[rows], 1.0)

    def truth(self, computes: str) -> Results:
        weight, scale = self.weight.double(), 1 / len(self.hidden)

        def fp64(rows: Tensor) -> tuple[Tensor, Tensor]:
            log_q, log_p = (
                torch.log_softmax(hidden[rows].double() @ weight.t(), dim=-1)
                for hidden in (self.hidden, self.teacher)
            )
            p = log_p.exp()
            return (p * (log_p - log_q)).sum(), log_q.exp() - p

        each = torch.arange(len(self.hidden), device=weight.device).split(TRUTH_ROWS)
        loss = torch.stack([fp64(rows)[0] for rows in each]).sum()
        return {"loss": loss * scale, "d_hidden": scale * fp64(self.rows)[1] @ weight}

    def sampled(self, results: Results) -> Results:
        return results | {"d_hidden": results["d_hidden"][self.rows]}

    def run(self, loss: Loss) -> Results:
        hidden = self.hidden.detach().requires_grad_()
        made = loss(hidden, self.weight, self.teacher, self.weight)
        return {"loss": made.detach(), "d_hidden": torch.autograd.grad(made, hidden)[0]}

    def own(self, backend: str, fp32_logits: bool = False) -> Results:
        if fp32_logits and self.dtype == torch.float32:
            raise AbsentError("the logits of a float32 head are float32")
        loss, d_hidden = linear_kl(
            self.hidden, self.weight, self.teacher, self.weight,
            fp32_logits=fp32_logits, backend=backend,
        )  # fmt: skip
        return {"loss": loss, "d_hidden": d_hidden}


def peer(load: Callable[[], Loss]) -> Provider:
    """Return a fused loss; load() imports it, or raises AbsentError."""
    return Provider(lambda case: partial(case.run, load()))


def liger_jsd() -> Loss:
    needs_triton()
    jsd: Any = imported("liger_kernel.transformers.functional", "liger_fused_linear_jsd")
    return partial(jsd, jsd_beta=0.0)


def liger_kl() -> Loss:
    needs_triton()
    kl = imported("liger_kernel.transformers.functional", "liger_fused_linear_kl_div")

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        p = torch.softmax(linear(teacher, teacher_weight), dim=-1, dtype=torch.float32)
        made: Tensor = kl(hidden, weight, p)
        return made

    return loss


def liger_chunked() -> Loss:
    jsd = imported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")(0.0, 1.0, beta=0.0)

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        made: Tensor = jsd(hidden, weight, teacher, teacher_weight, labels)
        return made

    return loss


def trl_chunked() -> Loss:
    function = imported("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def loss(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        divergence, _ = function.apply(hidden, weight, None, teacher, teacher_weight, None, 0.0)
        return divergence.mean()

    return loss


Distillation.PROVIDERS = providers(Distillation.own, eager, None) | {
    "ours, triton, fp32 logits": ours(partial(Distillation.own, fp32_logits=True), "triton"),
    "ours, by autograd": Provider(lambda case: partial(case.run, linear_kl_loss)),
    "Liger": peer(liger_jsd),
    "Liger, given probabilities": peer(liger_kl),
    "Liger, chunked": peer(liger_chunked),
    "TRL": peer(trl_chunked),
}
CASES = {"linear_kl": Distillation}


def test_linear_kl(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
