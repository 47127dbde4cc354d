"""Time the scoring of a whole model that fits, beside the arithmetic of the paper's script.

The model has Llama-3.1-8B's shape and random weights; sequences are of 1024 tokens. Every provider
scores the same sequences and is checked first: ours may be off from fp32 by twice what plain bf16
torch is off by, and one rounding; the reference also rounds each product, each sum over the tokens
and each sequence's total. Then they are timed in turn with large bf16 products, which are the
yardstick, so that the clocks are the same for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_phase
import hfprune_reference
import torch
from gpu_phase import BF16, SEQ_LEN, Phase, U, no_retreat
from meter import DEVICE, GPU, peak_bytes
from models import Shape, random_ids, random_model
from records import Row, row
from torch import Tensor, nn

from hfprune_fast import architectures, planning
from hfprune_fast.forward import ResidentModel, micro_batch
from hfprune_fast.planning import ModelShape, Plan
from hfprune_fast.scoring import How, backend_for, score_batches
from hfprune_fast.state import Totals

SHAPE = Shape(4096, 14336, 32, 32, 8, 128_256) if GPU else Shape(64, 160, 3, 4, 2, 500)
SEQUENCES = 8
ROUNDS, LEAST_ROUNDS = 7, 3
REFERENCE = "HFPrune's arithmetic"
FLOPS = SHAPE.needed_flops(SEQUENCES * SEQ_LEN)  # by anyone; not those that each executes


@dataclass(frozen=True)
class Variant:
    """One of ours; `chosen` is the planner's, `lean` the one that is held to little memory."""

    batch_size: int
    recompute: bool
    plan: Plan
    chosen: bool
    lean: bool

    @property
    def name(self) -> str:
        how = "recomputed" if self.recompute else "stored"
        return "ours" if self.chosen else f"ours, {how}, {self.batch_size} at once"


class Subject:
    """The model, its sequences, and every provider of their l1 scores."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = random_model(SHAPE, BF16, DEVICE)
        self.ids = random_ids(SEQUENCES, SEQ_LEN, SHAPE.vocab)
        self.on_device = self.ids.to(DEVICE)
        self.resident = ResidentModel(self.model)
        self.backend = backend_for(self.model.lm_head.weight, None, False)

    def variants(self) -> Iterator[Variant]:
        """Yield what the planner chooses, fewer and more at once, and with layers recomputed."""
        device, size = self.resident.device, architectures.size_of(self.model)
        shape = ModelShape.of(size, self.model.config)
        chosen = planning.plan_scoring(
            shape, device=device, dtype=BF16, seq_len=SEQ_LEN, sequences=SEQUENCES, loaded=True
        )
        print(f"planned: {chosen}", flush=True)
        reckoner = planning._Reckoner(
            shape, device, BF16, SEQ_LEN, SEQUENCES, chosen.free_bytes, loaded=True
        )
        for recompute, batch_sizes in ((False, {1, 4, 8, chosen.batch_size}), (True, {2, 4})):
            for batch_size in sorted(batch_sizes):
                plans = reckoner.plans(batch_size, exact=True, offload="none")
                plan = next(plan for plan in plans if plan.recompute is recompute)
                is_chosen = not recompute and batch_size == chosen.batch_size
                lean = recompute and batch_size == 2
                yield Variant(batch_size, recompute, plan, is_chosen, lean)

    def ours(self, variant: Variant, totals: Totals | None = None) -> Totals:
        budget = variant.plan.logits_budget_bytes
        how = How(backend=self.backend, recompute=variant.recompute, logits_budget_bytes=budget)
        batches = micro_batch(self.ids, SHAPE.vocab).split(variant.batch_size)
        with no_retreat(), self.resident as model:
            return score_batches(model, batches, how, totals)

    def reference(self) -> Tensor:
        return hfprune_reference.score(self.model, self.on_device)

    def plain(self) -> Tensor:
        """Return (L, F) fp64, the plainest way in the model's dtype: autograd from H to acts."""
        acts: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor]) -> None:
            acts.append(args[0])

        layers = self.model.model.layers
        handles = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in layers]
        l1 = torch.zeros(len(layers), SHAPE.width, dtype=torch.float64, device=DEVICE)
        for sequence in self.on_device:
            embedded = self.model.get_input_embeddings()(sequence[None]).requires_grad_()
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits
            log_p = torch.log_softmax(logits.float(), dim=-1)
            entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()
            for layer, grad in enumerate(torch.autograd.grad(entropy, acts)):
                l1[layer] += (acts[layer].detach().double() * grad.double()).abs().sum((0, 1))
            acts.clear()
        for handle in handles:
            handle.remove()
        return l1

    def truth(self) -> Tensor:
        """Return the same in fp32, of the same weights."""
        for dtype in (torch.float32, BF16):
            for parameter in self.model.parameters():  # and not the rotary tables, which stay fp32
                parameter.data = parameter.data.to(dtype)
            if dtype == torch.float32:
                l1 = self.plain()
        if GPU:
            torch.cuda.empty_cache()
        return l1


def checked(
    subject: Subject, variants: dict[str, Variant], phase: Phase
) -> dict[str, tuple[Callable[[], object], dict[str, Any]]]:
    """Return the calls whose scores were right, each with what was found of it."""
    phase.note("scores in fp32 and in plain bf16")
    truth = subject.truth()
    plain = gpu_phase.relative_errors(subject.plain(), truth)
    found = {}
    for name in (*variants, REFERENCE):
        phase.note(f"{name}: checked")
        try:
            if name == REFERENCE:
                call, roundings, l1 = subject.reference, 3 + SEQUENCES, subject.reference()
            else:
                totals = subject.ours(variants[name])
                l1, roundings = totals.statistics[0, 0].clone(), 1
                # Timed as all passes of a run but the first, which looks at the weights' columns.
                call = partial(subject.ours, variants[name], totals)
            error = gpu_phase.relative_errors(l1, truth)
            fields = gpu_phase.checked(name, error, 2 * plain + roundings * U)
            # Of a rehearsal, memory would tell nothing.
            found[name] = call, fields | {"peak_bytes": peak_bytes(call) if GPU else 0}
        except Exception as error:
            phase.failed(name, error)
    return found


def row_of(
    name: str, variant: Variant | None, times: dict[str, list[float]], floors_ms: list[float],
    **fields: Any,
) -> Row:  # fmt: skip
    """Return a row in the form of result files, with what became of its targets."""
    for field, over, under in (
        ("times_first", name, "ours"), ("times_reference", REFERENCE, name),
    ):  # fmt: skip
        pairs = zip(times.get(over, ()), times.get(under, ()), strict=False)
        if ratios := [a / b for a, b in pairs]:
            fields[field] = statistics.median(ratios)
    identity = {
        "op": "score", "model": "Llama-3.1-8B" if GPU else "", "dtype": "bfloat16",
        "sizes": {"T": SEQUENCES * SEQ_LEN, **SHAPE.sizes}, "provider": name,
        "computes": "entropy",
    }  # fmt: skip
    found = row(identity, times[name], floors_ms, floor="products", flops=FLOPS, **fields)
    if variant:
        found["planned_bytes"] = variant.plan.total_bytes
        if found["peak_bytes"]:
            found["planned_ratio"] = found["planned_bytes"] / found["peak_bytes"]
        found["verdict"] = judged(found, variant.chosen, variant.lean)
    return found


def judged(found: Row, chosen: bool, lean: bool) -> str:
    speed, part, planned = (
        found.get(name, 1.0) for name in ("times_reference", "percent_of_floor", "planned_ratio")
    )
    least = 1.8 if chosen else 0.9 if lean else 0
    gb = found["peak_bytes"] / 1e9
    return gpu_phase.verdict({
        f"{planned:.2f} of the peak was planned, not 0.8": planned < 0.8,
        f"{speed:.2f} x the reference's speed, not {least}": speed < least,
        f"{part:.0f} % of the products' rate, not 60": chosen and part < 60,
        f"{gb:.2f} GB beside the weights, not 2": lean and gb > 2,
    })  # fmt: skip


def main() -> None:
    phase = Phase.from_arguments(__doc__)
    phase.note("the model")
    subject = Subject()
    variants = {variant.name: variant for variant in subject.variants()}
    right = checked(subject, variants, phase)
    gemm, gemm_flops = gpu_phase.products()
    calls = {"products": gemm} | {name: call for name, (call, _) in right.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(ROUNDS if GPU else LEAST_ROUNDS):
        if done >= LEAST_ROUNDS and phase.late:
            break
        phase.note(f"round {done}")
        for name, call in calls.items():
            times[name].append(gpu_phase.milliseconds(call))
    phase.result["products_tflops"] = gemm_flops / statistics.median(times["products"]) / 1e9
    floors_ms = [ms * FLOPS / gemm_flops for ms in times["products"]]
    for name, (_, fields) in sorted(right.items(), key=lambda item: item[0] != "ours"):
        phase.rows.append(row_of(name, variants.get(name), times, floors_ms, **fields))
    phase.note("done")


if __name__ == "__main__":
    main()
