"""A language-model head, its entropy and the gradient at its input, beside fused cross entropies.

    .venv/bin/pytest bench/bench_linear_entropy.py --small

    (T, D) hidden, (V, D) frozen weight -> mean H, (T, D) dH/dhidden           4·T·D·V FLOPs

Liger, Cut Cross Entropy and torch's linear_cross_entropy compute the cross entropy of given labels
(`computes`), which nothing here turns into an entropy: they stand beside it because the products
and the memory are those of the same shape. They are checked against cross entropy. The floor is the
two products alone, in the chunks that ours takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from baselines.hfprune_reference import entropy_of
from bench_entropy import compiled, eager_entropy, fp64_entropy
from case import AbsentError, Case, Provider, Results, needs_triton, spread_rows
from shapes import Spec, of_models
from torch import Tensor
from torch.nn import functional

from hfprune_fast.kernels import linear_entropy
from hfprune_fast.kernels._head import Buffers, onednn_linear, product, product_back

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Rows of logits that the truth makes at a time, in fp64.
TRUTH_ROWS = 64
# Cut Cross Entropy leaves out blocks of the gradient in which all p are below 2^-12 (bf16's eps /
# 32): 2.8 % of its norm in a simulation at V = 128256.
FILTERED = 0.05


class Head(Case):
    """Hidden states of a size that makes logits of standard deviation 3, and labels."""

    floor_name = "products"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        tokens, width, vocab = (spec.sizes[letter] for letter in "TDV")
        self.hidden = self.normal(tokens, width)
        self.weight = self.normal(vocab, width, std=3 / width**0.5)
        device = self.hidden.device
        self.target = torch.randint(vocab, (tokens,), device=device, generator=self.generator)
        self.rows = spread_rows(tokens)
        self.summed, self.inner_dtype = vocab, self.dtype  # of the logits
        self.flops = 4 * tokens * width * vocab
        self.bytes_moved = 2 * self.hidden.nbytes + self.weight.nbytes

    def floor(self) -> None:
        linear = onednn_linear(self.hidden, self.weight)
        buffers = Buffers.allocate(self.hidden, self.weight, False, None, linear is None)
        d_hidden = torch.empty_like(self.hidden)
        for start in range(0, len(self.hidden), len(buffers.logits)):
            hidden = self.hidden[start : start + len(buffers.logits)]
            if linear is not None:
                linear(linear(hidden, self.weight, None), self.weight.t(), None)
                continue
            logits = buffers.logits[: len(hidden)]
            product(hidden, self.weight, None, logits, 0)
            product_back(logits, self.weight, d_hidden[start : start + len(hidden)], 1.0, 0)

    def truth(self, computes: str) -> Results:
        weight, scale = self.weight.double(), 1 / len(self.hidden)
        loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        for rows in torch.arange(len(self.hidden), device=weight.device).split(TRUTH_ROWS):
            loss += self._fp64_rows(rows, weight, computes)[0].sum() * scale
        _, d_logits = self._fp64_rows(self.rows, weight, computes)
        return {"loss": loss, "d_hidden": scale * d_logits @ weight}

    def _fp64_rows(self, rows: Tensor, weight: Tensor, computes: str) -> tuple[Tensor, Tensor]:
        """The losses of some rows, and their gradients at the logits."""
        logits = self.hidden[rows].double() @ weight.t()
        if computes == "entropy":
            return fp64_entropy(logits)
        labels = self.target[rows, None]
        p = torch.softmax(logits, dim=-1)
        losses = -p.gather(1, labels).log()
        return losses[:, 0], p.scatter_add(1, labels, -torch.ones_like(losses))

    def plain(self, computes: str) -> Results:
        losses = {"entropy": eager_entropies, "cross entropy": eager_cross_entropies}[computes]
        all_rows = torch.arange(len(self.hidden), device=self.hidden.device)
        each = [losses(self.hidden[r], self.weight, self.target[r]) for r in all_rows.split(512)]
        hidden = self.hidden[self.rows].requires_grad_()
        loss = losses(hidden, self.weight, self.target[self.rows]).sum() / len(self.hidden)
        return {"loss": torch.cat(each).mean(), "d_hidden": torch.autograd.grad(loss, hidden)[0]}

    def sampled(self, results: Results) -> Results:
        return results | {"d_hidden": results["d_hidden"][self.rows]}


def differentiated(loss: Loss, case: Head) -> Results:
    hidden = case.hidden.detach().requires_grad_()
    made = loss(hidden, case.weight, case.target)
    (d_hidden,) = torch.autograd.grad(made, hidden)
    return {"loss": made.detach(), "d_hidden": d_hidden}


def eager_entropies(hidden: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return eager_entropy(functional.linear(hidden, weight))


def eager_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return eager_entropies(hidden, weight, target).mean()


def reference_loss(hidden: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return entropy_of(functional.linear(hidden, weight)).mean()


def eager_cross_entropies(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, target, reduction="none")


def by(make_loss: Callable[[], Loss]) -> Provider:
    """A provider of entropy by autograd."""

    def make(case: Head) -> Callable[[], Results]:
        loss = make_loss()
        return lambda: differentiated(loss, case)

    return Provider(make)


def ours(backend: str, *, fp32_logits: bool = False) -> Provider:
    def make(case: Head) -> Callable[[], Results]:
        if fp32_logits and case.dtype == torch.float32:
            raise AbsentError("the logits of a float32 head are float32")
        if backend == "triton":
            needs_triton()

        def call() -> Results:
            loss, d_hidden = linear_entropy(
                case.hidden, case.weight, fp32_logits=fp32_logits, backend=backend
            )
            return {"loss": loss, "d_hidden": d_hidden}

        return call

    return Provider(make)


def peer(load: Callable[[Head], Loss], more_error: float = 0.0) -> Provider:
    """A fused cross entropy; load() imports it, or raises AbsentError."""

    def make(case: Head) -> Callable[[], Results]:
        loss = load(case)
        return lambda: differentiated(loss, case)

    return Provider(make, computes="cross entropy", more_error=more_error)


def liger(case: Head) -> Loss:
    needs_triton()
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        raise AbsentError("liger-kernel is not installed") from None
    return liger_fused_linear_cross_entropy  # type: ignore[no-any-return]


def cut_cross_entropy(filter_eps: str | None) -> Callable[[Head], Loss]:
    def load(case: Head) -> Loss:
        needs_triton(interpreted=False)  # which multiplies bfloat16 wrongly
        if case.dtype == torch.float32:
            raise AbsentError("its gradients are for bfloat16 and float16")
        try:
            from cut_cross_entropy import linear_cross_entropy
        except ImportError:
            raise AbsentError("cut-cross-entropy is not installed") from None
        return lambda hidden, weight, target: linear_cross_entropy(
            hidden, weight, target, filter_eps=filter_eps
        )

    return load


def torch_linear_cross_entropy(case: Head) -> Loss:
    function = getattr(functional, "linear_cross_entropy", None)
    if function is None:
        raise AbsentError(f"torch {torch.__version__} has no linear_cross_entropy")
    # In the chunks that ours takes: of few tokens it would choose chunks of one row each, and its
    # bf16 loss, a sum over the chunks in bf16, was then off by 8 %.
    rows = len(Buffers.allocate(case.hidden, case.weight, False, None).logits)
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
    return lambda hidden, weight, target: function(hidden, weight, target, options=options)


Head.PROVIDERS = {
    "ours, torch": ours("torch"),
    "ours, triton": ours("triton"),
    "ours, triton, fp32 logits": ours("triton", fp32_logits=True),
    "HFPrune's arithmetic": by(lambda: reference_loss),
    "eager": by(lambda: eager_loss),
    "torch.compile": by(lambda: compiled(eager_loss)),
    "Liger": peer(liger),
    "Cut Cross Entropy": peer(cut_cross_entropy("high"), more_error=FILTERED),
    "Cut Cross Entropy, unfiltered": peer(cut_cross_entropy(None)),
    "torch linear_cross_entropy": peer(torch_linear_cross_entropy),
}
CASES = {"linear_entropy": Head}


def specs(scale: str) -> Iterator[Spec]:
    small = ("Llama-2-7B", "Qwen3-0.6B")
    yield from of_models("linear_entropy", scale, "TDV", small_tokens=128, small=small)
    fixed = {
        "full": {"T": 8192, "D": 4096, "V": 128256},
        "small": {"T": 256, "D": 512, "V": 32000},
        "tiny": {"T": 16, "D": 8, "V": 200},
    }[scale]
    series = {"T": (0.25, 0.5, 1, 2), "V": (0.25, 1, 4)} if scale != "tiny" else {"T": (1,)}
    for letter, factors in series.items():
        for factor in factors:
            sizes = fixed | {letter: int(factor * fixed[letter])}
            yield Spec("linear_entropy", "", "bfloat16", sizes, sweep=letter)


def test_linear_entropy(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)
