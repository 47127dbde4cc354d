"""Time the scoring of a model that does not fit: its layers are brought from the disk or from RAM.

`gpu_check.py --streamed` runs this in a process of its own, and reads the JSON file that it keeps
up to date. The model has Llama-3-70B's shape but fewer layers, as many as the disk holds and the
time allows, 12 at most; what is said of 80 layers is extrapolated from the time of one. torch is
held to 24 GB of the GPU. The first pass is checked against the same model resident, before that
limit is set: a layer that ran before its weights were there would show.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gpu_judge import U, check_rows, no_retreat, relative_errors
from gpu_progress import (
    BF16,
    SEQ_LEN,
    SPARE_BYTES,
    Progress,
    evict,
    filesystem,
    gemm_tflops,
)
from meter import DEVICE, GPU, synchronize
from models import Shape, random_ids, write_checkpoint
from records import row as record
from torch import Tensor

from hfprune_fast import loading, planning
from hfprune_fast.forward import MicroBatch, ResidentModel, micro_batch
from hfprune_fast.planning import ModelShape, Plan
from hfprune_fast.scoring import How, backend_for, score_batches
from hfprune_fast.streaming import running

SHAPE = Shape(8192, 28672, 80, 64, 8, 128_256) if GPU else Shape(64, 160, 6, 4, 2, 500)
MOST_LAYERS = 12 if GPU else 3
CAP_BYTES = 24_000_000_000
PASS_SEQUENCES = (16, 32) if GPU else (4, 6)
BATCH_SIZE = None if GPU else 2  # None: the planner's
PASSES = 3  # of each size; the first is not counted: it checks the weights and pins memory
WRITE_SECONDS = 50
TARGET_PERCENT = 40


def executed_flops(layers: int, tokens: int) -> int:
    """Of the linear layers; attention's own products, some 1 % at 1024 tokens, are left out.

    A weight takes 2 FLOPs a token in a product forward, and 2 in that of the gradient at the
    product's input. Every layer runs forward, and once more in the backward but for down_proj,
    whose output nobody needs again. In the first only the gradient at down_proj's input is made.
    """
    down = SHAPE.mlp_params // 3
    forward, again = layers * SHAPE.layer_params, layers * (SHAPE.layer_params - down)
    backward = (layers - 1) * SHAPE.layer_params + down
    return 2 * tokens * (forward + again + backward + 2 * SHAPE.head_params)


class Marks:
    """When each micro-batch was done in each layer, on the device's clock; a `done` of scoring.

    It is called as a pass begins, and then for each micro-batch in the first layer, in the second
    and so on, in the head, and, backward, in the last layer, in the one before and so on.
    """

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def __call__(self, tokens: float) -> None:
        if GPU:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self.marks.append(mark)
        else:
            self.marks.append(time.perf_counter())

    def parts(self, layers: int, batches: int) -> dict[str, float]:
        """Seconds of a pass's parts; those of one layer leave out the first, which is unlike."""
        assert len(self.marks) == 1 + (2 * layers + 1) * batches
        begin = self.marks[0]
        at = [begin.elapsed_time(m) / 1e3 if GPU else m - begin for m in self.marks]
        forward, head = at[layers * batches], at[(layers + 1) * batches]
        return {
            "forward_s": forward,
            "head_s": head - forward,
            "backward_s": at[-1] - head,
            "layer_forward_s": (forward - at[batches]) / (layers - 1),
            "layer_backward_s": (at[2 * layers * batches] - head) / (layers - 1),
        }


class Streamed:
    """The checkpoint, what is asked of it, and what the resident model makes of it."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder, self.layers = folder, layers
        self.ids = random_ids(max(PASS_SEQUENCES), SEQ_LEN, SHAPE.vocab)
        blueprint = loading.blueprint(folder)
        self.device = blueprint.device
        self.shape = ModelShape.of(blueprint.checkpoint.size, blueprint.model.config)
        self.backend = backend_for(torch.empty(0, dtype=BF16, device=self.device), None, False)
        self.resident, self.band = self.resident_l1()
        self.wanted = {PASS_SEQUENCES[0]: self.resident}
        for sequences in PASS_SEQUENCES[1:]:
            self.wanted[sequences] = self.resident_run(self.plan("none", sequences), sequences)

    def plan(self, offload: str, sequences: int) -> Plan:
        return planning.plan_scoring(
            self.shape,
            device=self.device,
            dtype=BF16,
            seq_len=SEQ_LEN,
            sequences=sequences,
            batch_size=BATCH_SIZE,
            offload=offload,
        )

    def batches(self, plan: Plan, sequences: int) -> list[Any]:
        return micro_batch(self.ids[:sequences], SHAPE.vocab).split(plan.batch_size)

    def how(self, plan: Plan, sequences: int) -> How:
        return How(
            backend=self.backend,
            recompute=True,
            inputs_on_host=plan.inputs_on_host,
            pass_tokens=sequences * SEQ_LEN,
            logits_budget_bytes=plan.logits_budget_bytes,
        )

    def resident_l1(self) -> tuple[Tensor, Tensor]:
        """Scores of the first pass's sequences, with all layers on the device, and the band.

        The band is what may lie between two runs of the same arithmetic: as far as micro-batches
        of half the size, whose sums run in another order, are off twice, and one rounding.
        """
        sequences = PASS_SEQUENCES[0]
        plan = self.plan("none", sequences)
        half = replace(plan, batch_size=max(1, plan.batch_size // 2))
        found = [self.resident_run(each, sequences) for each in (plan, half)]
        return found[0], 2 * relative_errors(found[1], found[0]) + U

    def resident_run(self, plan: Plan, sequences: int) -> Tensor:
        with no_retreat(), ResidentModel(loading.build(loading.blueprint(self.folder))) as model:
            batches, how = self.batches(plan, sequences), self.how(plan, sequences)
            return score_batches(model, batches, how).statistics[0, 0].cpu()

    def too_little(self, offload: str) -> str | None:
        """Why there is not enough host memory to try, if so."""
        # As torch pins them: powers of two.
        sizes = (2 * n for n in (SHAPE.layer_params, SHAPE.head_params))
        layer, head = (1 << (size - 1).bit_length() for size in sizes)
        pinned = self.layers * layer + head if offload == "cpu" else 2 * max(layer, head)
        inputs = 2 * max(PASS_SEQUENCES) * SEQ_LEN * (self.layers + 2) * SHAPE.hidden
        needed, free = pinned + 2 * inputs, planning.available_bytes(torch.device("cpu"))
        if free > needed:
            return None
        return (
            f"offload {offload}: {needed / 1e9:.1f} GB of host memory needed, "
            f"{free / 1e9:.1f} GB there"
        )

    def measure(self, offload: str, progress: Progress, deadline: float) -> None:
        """Add a row for each size of pass, each with 2 passes at least."""
        plans = [self.plan(offload, sequences) for sequences in PASS_SEQUENCES]
        totals = None
        done: list[MicroBatch] = []  # again and again, with the totals of all so far
        with no_retreat(), running(loading.blueprint(self.folder), offload) as model:
            for sequences, plan in zip(PASS_SEQUENCES, plans, strict=True):
                name = f"offload {offload}, passes of {sequences * SEQ_LEN} tokens"
                if totals is not None and time.monotonic() > deadline:
                    progress.result["skipped"].append(f"{name}: out of time")
                    continue
                batches, how = self.batches(plan, sequences), self.how(plan, sequences)
                passes: list[dict[str, float]] = []
                checked: dict[str, Any] = {}
                if GPU:
                    torch.cuda.reset_peak_memory_stats()
                while len(passes) < 2 or (len(passes) < PASSES and time.monotonic() < deadline):
                    marks = Marks()
                    begin = time.perf_counter()
                    done += batches
                    new = score_batches(model, done, how, totals, done=marks)
                    synchronize()
                    wall = {"s": time.perf_counter() - begin}
                    passes.append(wall | marks.parts(self.layers, len(batches)))
                    progress.note(f"{name}: {wall['s']:.2f} s")
                    if not checked:
                        added = new.statistics[0, 0].cpu()
                        added = added if totals is None else added - totals.statistics[0, 0].cpu()
                        error = relative_errors(added, self.wanted[sequences])
                        checked = check_rows(name, error, self.band)
                    totals = new
                row = {"provider": offload, "layers": self.layers, "batch_size": plan.batch_size}
                row |= {"pass_tokens": sequences * SEQ_LEN, "planned_tokens": plan.pass_tokens}
                row |= checked | self.result_of(passes, sequences * SEQ_LEN, plan)
                row |= judged(row, progress.result["gemm_tflops"])
                progress.result["rows"].append(row)

    def result_of(self, passes: list[dict[str, float]], tokens: int, plan: Plan) -> dict[str, Any]:
        """What passes of one size took; the first of them is kept, but not counted."""
        median = {k: statistics.median(a_pass[k] for a_pass in passes[1:]) for k in passes[0]}
        layer_s = median["layer_forward_s"] + median["layer_backward_s"]
        whole_s = median["s"] + (SHAPE.layers - self.layers) * layer_s
        return {
            **median,
            "passes": passes,
            "flops": executed_flops(self.layers, tokens),
            "layer_gb_per_s": 2 * SHAPE.layer_params / median["layer_forward_s"] / 1e9,
            "extrapolated": {
                "layers": SHAPE.layers,
                "s": whole_s,
                "flops": executed_flops(SHAPE.layers, tokens),
            },
            "planned_bytes": plan.total_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated() if GPU else 0,
            "reserved_bytes": torch.cuda.max_memory_reserved() if GPU else 0,
        }


def judged(row: dict[str, Any], gemm_tflops: float) -> dict[str, Any]:
    """The rates of a row, as measured and as extrapolated, and what became of its target."""
    for run in (row, row["extrapolated"]):
        run["tokens_per_s"] = row["pass_tokens"] / run["s"]
        run["tflops"] = run["flops"] / run["s"] / 1e12
        run["percent_of_gemm"] = 100 * run["tflops"] / gemm_tflops
    fast = row["percent_of_gemm"] >= TARGET_PERCENT
    return {
        "planned_ratio": row["planned_bytes"] / row["peak_bytes"] if row["peak_bytes"] else None,
        "cap_bytes": CAP_BYTES,
        "target_percent": TARGET_PERCENT,
        "verdict": "pass" if fast and row["reserved_bytes"] <= CAP_BYTES else "missed",
    }


def main() -> None:
    progress = Progress.from_arguments("streamed", __doc__)
    result = progress.result
    torch.manual_seed(0)
    result |= {"model": asdict(SHAPE), "seq_len": SEQ_LEN, "gemm_tflops": gemm_tflops()}
    folder = progress.out.parent / "streamed"  # which gpu_check.py removes, however this ends
    folder.mkdir()
    least = 2 * (2 * SHAPE.head_params + 2 * SHAPE.layer_params) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < least:
        result["skipped"].append(f"{least / 1e9:.0f} GB of disk needed, {free / 1e9:.0f} GB free")
        progress.note(result["skipped"][-1])
        return
    progress.note("the checkpoint")
    begin = time.monotonic()
    layers = write_checkpoint(
        folder, SHAPE, most_layers=MOST_LAYERS, deadline=begin + WRITE_SECONDS,
        spare_bytes=SPARE_BYTES, device=DEVICE,
    )  # fmt: skip
    written = sum(path.stat().st_size for path in folder.iterdir())
    result |= {"layers": layers, "checkpoint_bytes": written, "filesystem": filesystem(folder)}
    result["written_gb_per_s"] = written / (time.monotonic() - begin) / 1e9
    progress.note("the scores of the resident model")
    streamed = Streamed(folder, layers)
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / torch.cuda.mem_get_info()[1])
    for offload, share in (("disk", 0.5), ("cpu", 1.0)):
        if reason := streamed.too_little(offload):
            result["skipped"].append(reason)
            continue
        evict(folder)
        now = time.monotonic()
        try:
            streamed.measure(offload, progress, now + share * (progress.deadline - now))
        except Exception as error:
            progress.failed(f"offload {offload}", error)
    result["records"] = [record_of(row, result["gemm_tflops"]) for row in result["rows"]]
    progress.note("done")


def record_of(row: dict[str, Any], gemm_tflops: float) -> dict[str, Any]:
    """A row in the form of result files: of the layers that ran, nothing extrapolated."""
    identity = {
        "op": "score", "model": "", "dtype": "bfloat16", "computes": "entropy",
        "sizes": {"T": row["pass_tokens"], **SHAPE.sizes, "L": row["layers"]},
        "provider": f"ours, offload={row['provider']}",
    }  # fmt: skip
    times_ms = [1e3 * a_pass["s"] for a_pass in row["passes"][1:]]
    flops = replace(SHAPE, layers=row["layers"]).needed_flops(row["pass_tokens"])
    floors_ms = len(times_ms) * [flops / gemm_tflops / 1e9]
    return record(
        identity, times_ms, floors_ms, floor="products", flops=flops,
        peak_bytes=row["peak_bytes"], error=row["error"], error_allowed=row["error_allowed"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
