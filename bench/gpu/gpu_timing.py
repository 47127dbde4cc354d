"""Time every kernel beside its floor and its peers: the cases, providers and rows of the suites.

Rows of ours have what became of their target. A gradient at bf16 logits moves 4 bytes a logit if a
row stays in the cache between its two reads, which `percent_of_floor` is of, and 6 if not.
"""

from __future__ import annotations

import sys
import time

import bench_entropy
import bench_linear_entropy
import bench_linear_kl
import bench_norms
import bench_taylor
import torch
from case import Case, measured
from gpu_phase import Phase, verdict
from meter import GPU, ceilings
from records import Row
from shapes import Spec, specs_of

SCALE = "full" if GPU else "tiny"
SUITES = bench_entropy, bench_linear_entropy, bench_linear_kl, bench_taylor, bench_norms
CASES: dict[str, type[Case]] = {op: case for suite in SUITES for op, case in suite.CASES.items()}
OURS = "ours, triton"
# {operation: % of the floor} that ours should reach at Llama-3.1-8B's shape in bf16. The entropy's
# kernel moves 3 bytes where its floor counts 2, if a row does not stay in the cache: 85 % of that.
TARGETS = {
    "softmax_entropy_grad": 85 * 2 / 3, "linear_entropy": 100 / 1.15, "linear_kl": 100 / 1.15,
    "gated_taylor": 85,
}  # fmt: skip


def wanted() -> list[tuple[Spec, str]]:
    """Return every provider of every case: those with a target first, those slow to compile last,
    so that running out of time loses the rest.
    """

    def order(pair: tuple[Spec, str]) -> tuple[bool, ...]:
        spec, name = pair
        return (
            not (has_target(spec) and name == OURS), name == "torch.compile",
            spec.dtype == "float32", spec.model != "Llama-3.1-8B",
        )  # fmt: skip

    specs = specs_of(CASES, SCALE)
    return sorted(((s, name) for s in specs for name in CASES[s.op].PROVIDERS), key=order)


def has_target(spec: Spec) -> bool:
    shape = "Llama-3.1-8B" if GPU else "", "bfloat16"
    return spec.op in TARGETS and (spec.model, spec.dtype) == shape


def judged(spec: Spec, found: Row) -> Row:
    """Return a row of ours with what became of its target; tests/gpu has those of memory."""
    if found["provider"] != OURS or not has_target(spec) or "ms" not in found:
        return found
    reached, target = found["percent_of_floor"], TARGETS[spec.op]
    told = verdict({f"{reached:.1f} % of the floor, not {target:.0f}": reached < target})
    return {**found, "target_percent": target, "verdict": told}


def main() -> None:
    phase = Phase(*sys.argv[1:])  # of gpu_check.py: the file, the seconds
    phase.result["ceilings"] = ceilings(SCALE)
    made: tuple[Spec, Case] | None = None
    for spec, name in wanted():
        if phase.late:
            phase.rows.append({**vars(spec), "provider": name, "skipped": "out of time"})
            continue
        if made is None or made[0] != spec:
            made = None  # before the next one takes its memory
            made = spec, CASES[spec.op](spec)
        phase.note(f"{phase.deadline - time.monotonic():6.1f} s left  {spec}, {name}")
        found = judged(spec, measured(made[1], name))
        phase.rows.append(found)
        if "failed" in found and name.startswith("ours"):
            phase.result["errors"].append(f"{spec}, {name}: {found['failed']}")
        if GPU:
            torch.cuda.empty_cache()
    phase.note("done")


if __name__ == "__main__":
    main()
