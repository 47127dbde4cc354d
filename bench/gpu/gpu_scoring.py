"""Time the scoring of a whole model that fits, beside the arithmetic of the paper's script.

`gpu_check.py --scoring` runs this in a process of its own, and reads the JSON file that it keeps up
to date. The model has Llama-3.1-8B's shape and random weights; sequences are of 1024 tokens. Every
provider scores the same sequences, which is checked first, and is then timed in turn with the
others and with large bf16 products, which are the yardstick: so the clocks are the same for all.
"""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from baselines import hfprune_reference
from gpu_judge import Judge, no_retreat, rank_correlation
from gpu_progress import BF16, SEQ_LEN, Progress, products, seconds
from meter import DEVICE, GPU, peak_bytes
from models import Shape, random_ids, random_model
from records import row as record
from torch import Tensor, nn

from hfprune_fast import architectures, planning
from hfprune_fast.forward import ResidentModel, micro_batch
from hfprune_fast.planning import ModelShape, Plan
from hfprune_fast.scoring import How, backend_for, score_batches
from hfprune_fast.state import Totals

SHAPE = Shape(4096, 14336, 32, 32, 8, 128_256) if GPU else Shape(64, 160, 3, 4, 2, 500)
SEQUENCES = 8
ROUNDS, LEAST_ROUNDS = 7, 3
# Value of a row, how it must compare, to what, and in which words.
TARGETS: dict[str, tuple[str, Callable[[float, float], bool], float, str]] = {
    "planner": ("planned_ratio", operator.ge, 0.8, "of the peak was planned"),
    "stored": ("times_reference", operator.ge, 1.8, "x the reference's speed"),
    "gemm": ("percent_of_gemm", operator.ge, 60, "% of the products' rate"),
    "recomputed": ("times_reference", operator.ge, 0.9, "x the reference's speed"),
    "memory": ("extra_gb", operator.le, 2, "GB beside the weights"),
}


@dataclass(frozen=True)
class Way:
    """One of our ways to go about it; targets are those of TARGETS that it is held to."""

    batch_size: int
    recompute: bool
    plan: Plan
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"ours, {'recomputed' if self.recompute else 'stored'}, {self.batch_size} at once"


class Subject:
    """The model, its sequences, and every provider of their l1 scores."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = random_model(SHAPE, BF16, DEVICE)
        self.ids = random_ids(SEQUENCES, SEQ_LEN, SHAPE.vocab)
        self.on_device = self.ids.to(DEVICE)
        self.resident = ResidentModel(self.model)
        self.backend = backend_for(self.model.lm_head.weight, None, False)

    def ways(self) -> Iterator[Way]:
        """What the planner chooses, fewer and more at once, and with layers recomputed."""
        device, size = self.resident.device, architectures.size_of(self.model)
        shape = ModelShape.of(size, self.model.config)
        chosen = planning.plan_scoring(
            shape, device=device, dtype=BF16, seq_len=SEQ_LEN, sequences=SEQUENCES, loaded=True
        )
        print(f"planned: {chosen}", flush=True)
        reckoner = planning._Reckoner(
            shape, device, BF16, SEQ_LEN, SEQUENCES, chosen.free_bytes, loaded=True
        )
        stored, recomputed = {1, 4, 8, chosen.batch_size}, {2, 4}
        for recompute, batch_sizes in ((False, stored), (True, recomputed)):
            for batch_size in sorted(batch_sizes):
                plans = reckoner.plans(batch_size, exact=True, offload="none")
                plan = next(plan for plan in plans if plan.recompute is recompute)
                targets: tuple[str, ...] = ("planner",)
                if not recompute and batch_size == chosen.batch_size:
                    targets += ("stored", "gemm")
                elif recompute and batch_size == min(recomputed):
                    targets += ("recomputed", "memory")
                yield Way(batch_size, recompute, plan, targets)

    def ours(self, way: Way, totals: Totals | None = None) -> Totals:
        how = How(
            backend=self.backend,
            recompute=way.recompute,
            logits_budget_bytes=way.plan.logits_budget_bytes,
        )
        batches = micro_batch(self.ids, SHAPE.vocab).split(way.batch_size)
        with no_retreat(), self.resident as model:
            return score_batches(model, batches, how, totals)

    def reference(self) -> Tensor:
        return hfprune_reference.score(self.model, self.on_device)

    def plain(self) -> Tensor:
        """The plainest way, in the model's dtype, (L, F) in fp64: autograd from entropy to acts."""
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
        """The same in fp32, of the same weights."""
        self._cast(torch.float32)
        l1 = self.plain()
        self._cast(BF16)
        if GPU:
            torch.cuda.empty_cache()
        return l1

    def _cast(self, dtype: torch.dtype) -> None:
        for parameter in self.model.parameters():  # and not the rotary tables, which stay fp32
            parameter.data = parameter.data.to(dtype)


def extra_bytes(call: Callable[[], object]) -> int:
    """What a call takes beside the weights; a rehearsal's would tell nothing."""
    return peak_bytes(call) if GPU else 0


def judge_targets(row: dict[str, Any], targets: tuple[str, ...]) -> None:
    """Add to a row what became of its targets, of those that can be told."""
    row["missed"] = []
    for field, met, limit, words in map(TARGETS.__getitem__, targets):
        if row[field] is not None and not met(row[field], limit):
            row["missed"].append(f"{row[field]:.2f} {words}, not {limit}")
    row["verdict"] = "missed" if row["missed"] else "pass"


def checked(
    subject: Subject, ways: dict[str, Way], progress: Progress
) -> dict[str, Callable[[], object]]:
    """Return what can be timed, each after a call that was right, and of which there is a row."""
    result = progress.result
    progress.note("scores in fp32 and in plain bf16")
    judge = Judge(subject.truth(), subject.plain())
    result["plain_error"] = float(judge.plain_error.max())
    progress.note("reference: checked")
    reference = subject.reference()
    calls: dict[str, Callable[[], object]] = {"reference": subject.reference}
    row = {"provider": "reference", "batch_size": 1, "recompute": False, "planned_bytes": None}
    row |= judge.check("reference", reference, more_roundings=SEQUENCES + 2)
    result["rows"].append({**row, "extra_bytes": extra_bytes(subject.reference)})
    for name, way in ways.items():
        progress.note(f"{name}: checked")
        try:
            totals = subject.ours(way)
            l1 = totals.statistics[0, 0]
            row = {"provider": name, "batch_size": way.batch_size, "recompute": way.recompute}
            row |= judge.check(name, l1)
            row["rank_correlation"] = rank_correlation(l1, reference)
            row["planned_bytes"] = way.plan.total_bytes
            row["extra_bytes"] = extra_bytes(partial(subject.ours, way))
        except Exception as error:
            progress.failed(name, error)
            continue
        result["rows"].append(row)
        # Timed as all passes of a run but the first, which looks at the weights' columns.
        calls[name] = partial(subject.ours, way, totals)
    return calls


def timed(calls: dict[str, Callable[[], object]], progress: Progress) -> dict[str, list[float]]:
    """Milliseconds of each call, one after the other in rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(ROUNDS if GPU else LEAST_ROUNDS):
        if done >= LEAST_ROUNDS and time.monotonic() > progress.deadline:
            break
        progress.note(f"round {done}")
        for name, call in calls.items():
            times[name].append(1e3 * seconds(call))
    return times


def main() -> None:
    progress = Progress.from_arguments("scoring", __doc__)
    result = progress.result
    progress.note("the model")
    subject = Subject()
    result |= {
        "model": asdict(SHAPE),
        "sequences": SEQUENCES,
        "seq_len": SEQ_LEN,
        "attention": subject.model.config._attn_implementation,
        "backend": subject.backend,
    }
    ways = {way.name: way for way in subject.ways()}
    calls = checked(subject, ways, progress)
    gemm, gemm_flops = products()
    gemm()
    times = timed({"products": gemm, **calls}, progress)
    result["gemm_tflops"] = gemm_flops / statistics.median(times["products"]) / 1e9
    flops = 4 * (SHAPE.layers * SHAPE.layer_params + SHAPE.head_params) * SEQ_LEN
    result["flops_per_sequence"] = flops
    reference_ms = statistics.median(times["reference"]) / SEQUENCES
    for row in result["rows"]:
        name = row["provider"]
        row["times_ms"] = times[name]
        row["ms_per_sequence"] = statistics.median(times[name]) / SEQUENCES
        row["tokens_per_s"] = SEQ_LEN / row["ms_per_sequence"] * 1e3
        row["tflops"] = flops / row["ms_per_sequence"] / 1e9
        row["percent_of_gemm"] = 100 * row["tflops"] / result["gemm_tflops"]
        row["times_reference"] = reference_ms / row["ms_per_sequence"]
        row["extra_gb"] = row["extra_bytes"] / 1e9
        measured = row["planned_bytes"] is not None and row["extra_bytes"] > 0
        row["planned_ratio"] = row["planned_bytes"] / row["extra_bytes"] if measured else None
        if name in ways:
            judge_targets(row, ways[name].targets)
    result["records"] = records_of(result, times, ways)
    progress.note("done")


def records_of(
    result: dict[str, Any], times: dict[str, list[float]], ways: dict[str, Way]
) -> list[dict[str, Any]]:
    """The rows in the form of result files; what the planner chooses is plainly "ours"."""
    found = []
    _, gemm_flops = products()
    flops = SHAPE.needed_flops(SEQUENCES * SEQ_LEN)  # by anyone; not those that each executes
    floors_ms = [ms * flops / gemm_flops for ms in times["products"]]
    chosen = next((name for name, way in ways.items() if "stored" in way.targets), None)
    for row in result["rows"]:
        name = row["provider"]
        shown = {"reference": "HFPrune's arithmetic", chosen: "ours"}.get(name, name)
        first = zip(times[name], times[chosen], strict=True) if chosen in times else ()
        ratios = [a / b for a, b in first]
        identity = {
            "op": "score", "model": "Llama-3.1-8B" if GPU else "", "dtype": "bfloat16",
            "sizes": {"T": SEQUENCES * SEQ_LEN, **SHAPE.sizes}, "provider": shown,
            "computes": "entropy",
        }  # fmt: skip
        found.append(record(
            identity, times[name], floors_ms, floor="products", flops=flops,
            **({"times_first": statistics.median(ratios)} if ratios else {}),
            peak_bytes=row["extra_bytes"], error=row["error"], error_allowed=row["error_allowed"],
        ))  # fmt: skip
    return sorted(found, key=lambda row: row["provider"] != "ours")


if __name__ == "__main__":
    main()
