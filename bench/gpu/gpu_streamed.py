"""Time the scoring of a model that does not fit: its layers are read from the disk or from RAM.

The model has Llama-3-70B's shape but fewer layers, as many as the disk holds and the time allows,
12 at most; the seconds of 80 layers are extrapolated from those of one. torch is limited to 24 GB
of the GPU. The first pass of each size is checked against the same model resident, before that
limit is set: a layer that ran before its weights were there would show. It also reads from the
disk and pins memory, so it is not counted; the others find them in the system's cache.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_phase
import torch
from gpu_phase import BF16, SEQ_LEN, Phase, U, checked, no_retreat, relative_errors
from meter import DEVICE, GPU, synchronize
from models import Shape, random_ids, write_checkpoint
from records import Row, row
from torch import Tensor

from hfprune_fast.checkpoint import loading
from hfprune_fast.engine import planner
from hfprune_fast.data.batches import MicroBatch, micro_batch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.engine.planner import Plan
from hfprune_fast.scoring.passes import How
from hfprune_fast.scoring.run import backend_for, score_batches
from hfprune_fast.engine.streaming import open_model

SHAPE = Shape(8192, 28672, 80, 64, 8, 128_256) if GPU else Shape(64, 160, 6, 4, 2, 500)
MOST_LAYERS = 12 if GPU else 3
CAP_BYTES = 24_000_000_000
SPARE_BYTES = 8 << 30 if GPU else 0  # left free on the disk
PASS_SEQUENCES = (16, 32) if GPU else (4, 6)
BATCH_SIZE = None if GPU else 2  # None: the planner's
PASSES = 3  # of each size
WRITE_SECONDS = 50
TARGET_PERCENT = 40


def executed_flops(layers: int, tokens: int) -> int:
    """Count the FLOPs of the linear layers; attention's own products, some 1 %, are left out.

    A weight takes 2 FLOPs a token in a product forward, and 2 in that of the gradient at the
    product's input. Every layer runs forward, and once more in the backward but for down_proj,
    whose output is not needed again. In the first only the gradient at down_proj's input is made.
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
        self.marks.append(torch.cuda.Event(enable_timing=True) if GPU else time.perf_counter())
        if GPU:
            self.marks[-1].record()

    def parts(self, layers: int, batches: int) -> dict[str, float]:
        """Return seconds of a pass's parts; those of a layer leave out the first, which differs."""
        begin, *marks = self.marks
        at = [begin.elapsed_time(m) / 1e3 if GPU else m - begin for m in marks]
        assert len(at) == (2 * layers + 1) * batches
        first, forward, head, but_first = (
            at[n * batches - 1] for n in (1, layers, layers + 1, 2 * layers)
        )
        return {
            "forward_s": forward,
            "head_s": head - forward,
            "backward_s": at[-1] - head,
            "layer_forward_s": (forward - first) / (layers - 1),
            "layer_backward_s": (but_first - head) / (layers - 1),
        }


class Streamed:
    """The checkpoint, and what the resident model makes of it."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder, self.layers = folder, layers
        self.ids = random_ids(max(PASS_SEQUENCES), SEQ_LEN, SHAPE.vocab)
        blueprint = loading.blueprint(folder)
        self.device = blueprint.device
        self.shape = ModelSpec.of(blueprint.checkpoint.size, blueprint.model.config)
        self.backend = backend_for(torch.empty(0, dtype=BF16, device=self.device), None, False)
        self.wanted = {n: self.resident_l1(self.plan("none", n), n) for n in PASS_SEQUENCES}
        # What two runs of the same arithmetic may differ by: twice what micro-batches of half the
        # size do, whose sums run in another order, and one rounding.
        n = PASS_SEQUENCES[0]
        plan = self.plan("none", n)
        half = self.resident_l1(replace(plan, batch_size=max(1, plan.batch_size // 2)), n)
        self.band = 2 * relative_errors(half, self.wanted[n]) + U

    def plan(self, offload: str, sequences: int) -> Plan:
        return planner.plan_scoring(
            self.shape, device=self.device, dtype=BF16, seq_len=SEQ_LEN, sequences=sequences,
            batch_size=BATCH_SIZE, offload=offload,
        )  # fmt: skip

    def batches(self, plan: Plan, sequences: int) -> list[MicroBatch]:
        return micro_batch(self.ids[:sequences], SHAPE.vocab).split(plan.batch_size)

    def how(self, plan: Plan, sequences: int) -> How:
        return How(
            backend=self.backend, recompute=True, inputs_on_host=plan.inputs_on_host,
            pass_tokens=sequences * SEQ_LEN, logits_budget_bytes=plan.logits_budget_bytes,
        )  # fmt: skip

    def resident_l1(self, plan: Plan, sequences: int) -> Tensor:
        with no_retreat(), ResidentModel(loading.build(loading.blueprint(self.folder))) as model:
            batches, how = self.batches(plan, sequences), self.how(plan, sequences)
            return score_batches(model, batches, how).statistics[0, 0].cpu()

    def too_little(self, offload: str) -> str | None:
        """Say that there is not enough host memory to try, if so."""
        # As torch pins them: powers of two.
        sizes = (2 * n for n in (SHAPE.layer_params, SHAPE.head_params))
        layer, head = (1 << (size - 1).bit_length() for size in sizes)
        pinned = self.layers * layer + head if offload == "cpu" else 2 * max(layer, head)
        inputs = 2 * max(PASS_SEQUENCES) * SEQ_LEN * (self.layers + 2) * SHAPE.hidden
        needed, free = pinned + 2 * inputs, machine.available_bytes(torch.device("cpu"))
        told = (
            f"offload {offload}: {needed / 1e9:.1f} GB of host memory needed, {free / 1e9:.1f} free"
        )
        return None if free > needed else told

    def measure(self, offload: str, phase: Phase, deadline: float) -> None:
        """Add a row for each size of pass, each with 2 passes at least."""
        totals = None
        done: list[MicroBatch] = []  # again and again, with the totals of all so far
        with no_retreat(), open_model(loading.blueprint(self.folder), offload) as model:
            for sequences in PASS_SEQUENCES:
                name = f"offload {offload}, passes of {sequences * SEQ_LEN} tokens"
                if totals is not None and time.monotonic() > deadline:
                    phase.skip(f"{name}: out of time")
                    continue
                plan = self.plan(offload, sequences)
                batches, how = self.batches(plan, sequences), self.how(plan, sequences)
                passes: list[dict[str, float]] = []
                error: dict[str, float] = {}
                if GPU:
                    torch.cuda.reset_peak_memory_stats()
                while len(passes) < 2 or (len(passes) < PASSES and time.monotonic() < deadline):
                    marks, begin = Marks(), time.perf_counter()
                    done += batches
                    new = score_batches(model, done, how, totals, done=marks)
                    synchronize()
                    wall = {"s": time.perf_counter() - begin}
                    passes.append(wall | marks.parts(self.layers, len(batches)))
                    phase.note(f"{name}: {wall['s']:.2f} s")
                    if not error:
                        added = new.statistics[0, 0].cpu()
                        added = added if totals is None else added - totals.statistics[0, 0].cpu()
                        error = checked(
                            name, relative_errors(added, self.wanted[sequences]), self.band
                        )
                    totals = new
                gflop_per_s = phase.result["products_tflops"] * 1e3
                phase.rows.append(
                    self.row_of(offload, plan, passes, sequences, gflop_per_s) | error
                )

    def row_of(
        self, offload: str, plan: Plan, passes: list[dict[str, float]], sequences: int,
        gflop_per_s: float,
    ) -> Row:  # fmt: skip
        """Return a row of the layers that ran, and what a model of all layers would take."""
        tokens = sequences * SEQ_LEN
        identity = {
            "op": "score", "model": "", "dtype": "bfloat16", "computes": "entropy",
            "sizes": {"T": tokens, **SHAPE.sizes, "L": self.layers},
            "provider": f"ours, offload={offload}",
        }  # fmt: skip
        median = {k: statistics.median(a_pass[k] for a_pass in passes[1:]) for k in passes[0]}
        flops = replace(SHAPE, layers=self.layers).needed_flops(tokens)
        times_ms = [1e3 * a_pass["s"] for a_pass in passes[1:]]
        floors_ms = len(times_ms) * [1e3 * flops / gflop_per_s / 1e9]
        peak, reserved = (
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if GPU else (0, 0)
        )
        layer_s = median["layer_forward_s"] + median["layer_backward_s"]
        whole_s = median["s"] + (SHAPE.layers - self.layers) * layer_s
        executed = executed_flops(self.layers, tokens) / median["s"] / 1e9 / gflop_per_s * 100
        return row(
            identity, times_ms, floors_ms, floor="products", flops=flops, peak_bytes=peak,
            **{name: seconds for name, seconds in median.items() if name != "s"},
            passes=passes, planned_bytes=plan.total_bytes, executed_percent=executed,
            **({"planned_ratio": plan.total_bytes / peak} if peak else {}),
            layer_gb_per_s=2 * SHAPE.layer_params / median["layer_forward_s"] / 1e9,
            extrapolated_s={str(SHAPE.layers): whole_s},
            verdict=gpu_phase.verdict({
                f"{executed:.0f} % of the products' rate, not {TARGET_PERCENT}":
                    executed < TARGET_PERCENT,
                f"{reserved / 1e9:.1f} GB taken, not 24": reserved > CAP_BYTES,
            }),
        )  # fmt: skip


def evict(folder: Path) -> None:
    """Have the system forget a folder's files, so that they are read anew."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    phase = Phase.from_arguments(__doc__)
    torch.manual_seed(0)
    gemm, flops = gpu_phase.products()
    rate = flops / statistics.median(gpu_phase.milliseconds(gemm) for _ in range(5)) / 1e9
    folder = phase.out.parent / "streamed"  # which gpu_check.py removes, however this ends
    folder.mkdir()
    least = 2 * (2 * SHAPE.head_params + 2 * SHAPE.layer_params) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    phase.result["products_tflops"] = rate
    if free < least:
        phase.skip(f"{least / 1e9:.0f} GB of disk needed, {free / 1e9:.0f} GB free")
        return
    phase.note("the checkpoint")
    begin = time.monotonic()
    layers = write_checkpoint(
        folder, SHAPE, most_layers=MOST_LAYERS, deadline=begin + WRITE_SECONDS,
        spare_bytes=SPARE_BYTES, device=DEVICE,
    )  # fmt: skip
    written = sum(path.stat().st_size for path in folder.iterdir())
    phase.result["written_gb_per_s"] = written / (time.monotonic() - begin) / 1e9
    phase.note("the scores of the resident model")
    streamed = Streamed(folder, layers)
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / torch.cuda.mem_get_info()[1])
    for offload, share in (("disk", 0.5), ("cpu", 1.0)):
        if reason := streamed.too_little(offload):
            phase.skip(reason)
            continue
        evict(folder)
        now = time.monotonic()
        try:
            streamed.measure(offload, phase, now + share * (phase.deadline - now))
        except Exception as error:
            phase.failed(f"offload {offload}", error)
    phase.note("done")


if __name__ == "__main__":
    main()
