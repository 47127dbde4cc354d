"""Time the scoring of a whole model that fits, beside the arithmetic of the paper's script.

The model has Llama-3.1-8B's shape and random weights; sequences are of 1024 tokens. Every provider
scores the same sequences, and ours must agree with the reference as far as rounding explains. Then
they are timed in turn, with large bf16 products in each round, so that the clocks are the same.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_phase
import hfprune_reference
from gpu_phase import BF16, SEQ_LEN, Phase
from meter import DEVICE, GPU, peak_bytes
from models import Shape, checked_scores, random_ids, random_model
from records import Row, row
from torch import Tensor

from hfprune_fast.config import RunOptions
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.plan import Plan
from hfprune_fast.engine.planner import MemoryEstimator, plan_run
from hfprune_fast.models.spec import spec_of

SHAPE = Shape(4096, 14336, 32, 32, 8, 128_256) if GPU else Shape(64, 160, 3, 4, 2, 500)
SEQUENCES = 8
ROUNDS, LEAST_ROUNDS = 7, 3
OURS, LEAN, REFERENCE = "ours", "ours, recomputed, 2 at once", "HFPrune's arithmetic"
FLOPS = SHAPE.needed_flops(SEQUENCES * SEQ_LEN)  # by anyone; not those that each executes


class Subject:
    """The model, its sequences, and every provider of their l1 scores."""

    def __init__(self) -> None:
        self.model = random_model(SHAPE, BF16, DEVICE)
        self.ids = random_ids(SEQUENCES, SEQ_LEN, SHAPE.vocab)
        self.on_device = self.ids.to(DEVICE)

    def plans(self) -> dict[str, Plan]:
        """Return what the planner chooses, fewer and more at once, and with layers recomputed."""
        spec = spec_of(self.model)
        chosen = plan_run(
            spec, RunOptions(), device=DEVICE, dtype=BF16, seq_len=SEQ_LEN, sequences=SEQUENCES,
            loaded=True,
        )  # fmt: skip
        print(f"planned: {chosen}", flush=True)
        estimator = MemoryEstimator(
            spec, DEVICE, BF16, SEQ_LEN, SEQUENCES, chosen.free_bytes, True, 1, False
        )
        found = {OURS: chosen}
        for how, sizes in ("stored", {1, 4, 8} - {chosen.batch_size}), ("recomputed", {2, 4}):
            for size in sorted(sizes):
                stored, recomputed = estimator.plans(size, exact=True, offload="none")
                plan = stored if how == "stored" else recomputed
                found[f"ours, {how}, {size} at once"] = plan
        return found

    def ours(self, plan: Plan) -> Tensor:
        with ResidentModel(self.model) as model:
            return gpu_phase.l1_scores(model, self.ids, plan)

    def reference(self) -> Tensor:
        return hfprune_reference.score(self.model, self.on_device)


def checked(
    subject: Subject, plans: dict[str, Plan], phase: Phase
) -> dict[str, tuple[Callable[[], object], dict[str, Any]]]:
    """Return the calls whose scores were right, each with what was found of it."""
    phase.note(f"{REFERENCE}: scores")
    wanted = subject.reference()
    found: dict[str, Any] = {}
    for name, plan in plans.items():
        phase.note(f"{name}: checked")
        try:
            got = subject.ours(plan)
            fields = checked_scores(name, got, wanted, SHAPE, SEQUENCES, SEQ_LEN)
            found[name] = partial(subject.ours, plan), fields
        except Exception as error:
            phase.failed(name, error)
    worst = max((fields for _, fields in found.values()), key=lambda fields: fields["error"])
    found[REFERENCE] = subject.reference, dict(worst)
    for call, fields in found.values():
        fields["peak_bytes"] = peak_bytes(call) if GPU else 0  # a rehearsal's would tell nothing
    return found


def row_of(
    name: str, plan: Plan | None, times: dict[str, list[float]], floors_ms: list[float],
    **fields: Any,
) -> Row:  # fmt: skip
    """Return a row in the form of result files, with what became of its targets."""
    for field, over, under in ("times_first", name, OURS), ("times_reference", REFERENCE, name):
        if over in times and under in times:
            ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
            fields[field] = statistics.median(ratios)
    identity = gpu_phase.identity("score", SHAPE, SEQUENCES * SEQ_LEN, name, gpu_phase.LLAMA_8B)
    found = row(identity, times[name], floors_ms, floor="products", flops=FLOPS, **fields)
    if plan:
        found["planned_bytes"] = plan.total_bytes
        if found["peak_bytes"]:
            found["planned_ratio"] = found["planned_bytes"] / found["peak_bytes"]
        found["verdict"] = judged(found)
    return found


def judged(found: Row) -> str:
    speed, part, planned = (
        found.get(name, 1.0) for name in ("times_reference", "percent_of_floor", "planned_ratio")
    )
    chosen, lean = (found["provider"] == name for name in (OURS, LEAN))
    least = 1.8 if chosen else 0.9 if lean else 0
    gb = found["peak_bytes"] / 1e9
    return gpu_phase.verdict({
        f"{planned:.2f} of the peak was planned, not 0.8": planned < 0.8,
        f"{speed:.2f} x the reference's speed, not {least}": speed < least,
        f"{part:.0f} % of the products' rate, not 60": chosen and part < 60,
        f"{gb:.2f} GB beside the weights, not 2": lean and gb > 2,
    })  # fmt: skip


def main() -> None:
    phase = Phase(*sys.argv[1:])  # of gpu_check.py: the file, the seconds
    phase.note("the model")
    subject = Subject()
    plans = subject.plans()
    right = checked(subject, plans, phase)
    times: dict[str, list[float]] = {name: [] for name in right}
    floors_ms: list[float] = []
    for done in range(ROUNDS if GPU else LEAST_ROUNDS):
        if done >= LEAST_ROUNDS and phase.late:
            break
        phase.note(f"round {done}")
        floors_ms.append(1e3 * FLOPS / gpu_phase.products_per_s())
        for name, (call, _) in right.items():
            times[name].append(gpu_phase.milliseconds(call))
    for name, (_, fields) in right.items():
        phase.rows.append(row_of(name, plans.get(name), times, floors_ms, **fields))
    phase.note("done")


if __name__ == "__main__":
    main()
