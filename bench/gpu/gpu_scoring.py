"""Time the scoring of a whole model that fits, beside the arithmetic of the paper's script.

The model has Llama-3.1-8B's shape and random weights; sequences are of 1024 tokens. Every provider
scores the same sequences, and ours must agree with the reference as far as rounding explains. Then
they are timed in turn with large bf16 products, which are the yardstick, so that the clocks are the
same for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import gpu_phase
import hfprune_reference
import torch
from gpu_phase import BF16, SEQ_LEN, Phase, no_retreat
from meter import DEVICE, GPU, peak_bytes
from models import Shape, random_ids, random_model, score_band
from records import Row, row
from torch import Tensor

from hfprune_fast.models import spec
from hfprune_fast.engine import planner
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.data.batches import micro_batch
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.engine.planner import Plan
from hfprune_fast.scoring.passes import How
from hfprune_fast.scoring.run import backend_for, score_batches

SHAPE = Shape(4096, 14336, 32, 32, 8, 128_256) if GPU else Shape(64, 160, 3, 4, 2, 500)
SEQUENCES = 8
ROUNDS, LEAST_ROUNDS = 7, 3
REFERENCE = "HFPrune's arithmetic"
FLOPS = SHAPE.needed_flops(SEQUENCES * SEQ_LEN)  # by anyone; not those that each executes


class Variant(NamedTuple):
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
        device, size = self.resident.device, spec.size_of(self.model)
        shape = ModelSpec.of(size, self.model.config)
        chosen = planner.plan_scoring(
            shape, device=device, dtype=BF16, seq_len=SEQ_LEN, sequences=SEQUENCES, loaded=True
        )
        print(f"planned: {chosen}", flush=True)
        reckoner = planner._Reckoner(
            shape, device, BF16, SEQ_LEN, SEQUENCES, chosen.free_bytes, loaded=True
        )
        for recompute, batch_sizes in ((False, {1, 4, 8, chosen.batch_size}), (True, {2, 4})):
            for batch_size in sorted(batch_sizes):
                plans = reckoner.plans(batch_size, exact=True, offload="none")
                plan = next(plan for plan in plans if plan.recompute is recompute)
                is_chosen = not recompute and batch_size == chosen.batch_size
                lean = recompute and batch_size == 2
                yield Variant(batch_size, recompute, plan, is_chosen, lean)

    def ours(self, variant: Variant) -> Tensor:
        budget = variant.plan.logits_budget_bytes
        how = How(backend=self.backend, recompute=variant.recompute, logits_budget_bytes=budget)
        batches = micro_batch(self.ids, SHAPE.vocab).split(variant.batch_size)
        with no_retreat(), self.resident as model:
            return score_batches(model, batches, how).statistics[0, 0]

    def reference(self) -> Tensor:
        return hfprune_reference.score(self.model, self.on_device)


def checked(
    subject: Subject, variants: dict[str, Variant], phase: Phase
) -> dict[str, tuple[Callable[[], object], dict[str, Any]]]:
    """Return the calls whose scores were right, each with what was found of it."""
    phase.note(f"{REFERENCE}: scores")
    wanted = subject.reference()
    band = score_band("bfloat16", SHAPE, SEQUENCES, SEQ_LEN)
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        phase.note(f"{name}: checked")
        try:
            error = gpu_phase.relative_errors(wanted, subject.ours(variant))
            fields = gpu_phase.checked(name, error, torch.full_like(error, band))
            found[name] = partial(subject.ours, variant), fields
        except Exception as error:
            phase.failed(name, error)
    worst = max(error["error"] for _, error in found.values())
    found[REFERENCE] = subject.reference, {"error": worst, "error_allowed": band}
    for call, fields in found.values():
        fields["peak_bytes"] = peak_bytes(call) if GPU else 0  # a rehearsal's would tell nothing
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
