"""Time the scoring of a model that does not fit: its layers are read from the disk or from RAM.

The model has Llama-3-70B's shape but fewer layers, as many as the disk holds and the time allows,
12 at most; the seconds of 80 layers are extrapolated by their FLOPs. torch is limited to 24 GB
of the GPU. The first pass of each size is checked against the same model resident, before that
limit is set: a layer that ran before its weights were there would show. It also pins memory, so it
is not counted. Files are in the system's cache.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_phase
import torch
from gpu_phase import BF16, SEQ_LEN, Phase, U, l1_scores
from meter import DEVICE, GPU, clock_s
from models import Shape, checked, random_ids, relative_errors, write_checkpoint
from records import Row, row
from torch import Tensor

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.skeleton import spec_from_config
from hfprune_fast.config import RunOptions
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.machine import available_bytes
from hfprune_fast.engine.plan import Plan
from hfprune_fast.engine.planner import plan_run
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
    Each MLP is run twice over 3 rows to compare its formula.
    """
    down = SHAPE.mlp_params // 3
    forward, again = layers * SHAPE.layer_params, layers * (SHAPE.layer_params - down)
    backward = (layers - 1) * SHAPE.layer_params + down
    compared = layers * 2 * 3 * SHAPE.mlp_params
    return 2 * (tokens * (forward + again + backward + 2 * SHAPE.head_params) + compared)


class Streamed:
    """The checkpoint, and what the resident model makes of it."""

    def __init__(self, folder: Path, layers: int, rate: float) -> None:
        self.folder, self.layers, self.shape = folder, layers, replace(SHAPE, layers=layers)
        self.rate = rate  # of products, FLOP/s
        self.ids = random_ids(max(PASS_SEQUENCES), SEQ_LEN, SHAPE.vocab)
        self.wanted = {n: self.resident_l1(self.plan("none", n), n) for n in PASS_SEQUENCES}
        # What two runs of the same arithmetic may differ by: twice what micro-batches of half the
        # size do, whose sums run in another order, and one rounding.
        n = PASS_SEQUENCES[0]
        plan = self.plan("none", n)
        half = self.resident_l1(replace(plan, batch_size=max(1, plan.batch_size // 2)), n)
        self.band = 2 * relative_errors(half, self.wanted[n]) + U

    def plan(self, offload: str, sequences: int) -> Plan:
        return plan_run(
            spec_from_config(self.folder)[0],
            RunOptions(batch_size=BATCH_SIZE, offload=offload),
            device=DEVICE, dtype=BF16, seq_len=SEQ_LEN, sequences=sequences,
        )  # fmt: skip

    def resident_l1(self, plan: Plan, sequences: int) -> Tensor:
        with open_model(loading.blueprint(self.folder), "none") as model:
            return self.l1(model, plan, sequences).cpu()

    def l1(self, model: ResidentModel, plan: Plan, sequences: int) -> Tensor:
        return l1_scores(
            model, self.ids[:sequences], plan, recompute=True,
            inputs_on_host=plan.inputs_on_host, pass_tokens=sequences * SEQ_LEN,
        )  # fmt: skip

    def measure(self, offload: str, phase: Phase, deadline: float) -> None:
        """Add a row for each size of a pass; the first size is measured in any case."""
        with open_model(loading.blueprint(self.folder), offload) as model:
            for sequences in PASS_SEQUENCES:
                name = f"offload {offload}, passes of {sequences * SEQ_LEN} tokens"
                if sequences != PASS_SEQUENCES[0] and time.monotonic() > deadline:
                    phase.skip(f"{name}: out of time")
                    continue
                plan = self.plan(offload, sequences)
                passes_s: list[float] = []
                error: dict[str, float] = {}
                if GPU:
                    torch.cuda.reset_peak_memory_stats()
                while len(passes_s) < 2 or (len(passes_s) < PASSES and time.monotonic() < deadline):
                    begin = clock_s()
                    found = self.l1(model, plan, sequences)
                    passes_s.append(clock_s() - begin)
                    phase.note(f"{name}: {passes_s[-1]:.2f} s")
                    error = error or checked(
                        name, relative_errors(found, self.wanted[sequences]), self.band
                    )
                phase.rows.append(self.row_of(offload, plan, passes_s, sequences) | error)

    def row_of(self, offload: str, plan: Plan, passes_s: list[float], sequences: int) -> Row:
        """Return a row of the layers that ran, and what a model of all layers would take."""
        tokens = sequences * SEQ_LEN
        identity = gpu_phase.identity("score", self.shape, tokens, f"ours, offload={offload}")
        times_ms, flops = [1e3 * s for s in passes_s[1:]], self.shape.needed_flops(tokens)
        median_s, needed = statistics.median(passes_s[1:]), executed_flops(self.layers, tokens)
        peak, reserved = (
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if GPU else (0, 0)
        )
        whole_s = median_s * executed_flops(SHAPE.layers, tokens) / needed
        executed = 100 * needed / median_s / self.rate
        return row(
            identity, times_ms, len(times_ms) * [1e3 * flops / self.rate], floor="products",
            flops=flops, peak_bytes=peak, passes_s=passes_s, planned_bytes=plan.total_bytes,
            **({"planned_ratio": plan.total_bytes / peak} if peak else {}),
            executed_percent=executed, extrapolated_s={str(SHAPE.layers): whole_s},
            verdict=gpu_phase.verdict({
                f"{executed:.0f} % of the products' rate, not {TARGET_PERCENT}":
                    executed < TARGET_PERCENT,
                f"{reserved / 1e9:.1f} GB taken, not 24": reserved > CAP_BYTES,
            }),
        )  # fmt: skip


def main() -> None:
    phase = Phase(*sys.argv[1:])  # of gpu_check.py: the file, the seconds
    rate = gpu_phase.products_per_s()
    phase.result["products_tflops"] = rate / 1e12
    folder = phase.out.parent / "streamed"  # which gpu_check.py removes, however this ends
    folder.mkdir()
    phase.note("the checkpoint")
    until = time.monotonic() + WRITE_SECONDS
    layers = write_checkpoint(folder, SHAPE, MOST_LAYERS, until, SPARE_BYTES, DEVICE)
    phase.note("the scores of the resident model")
    streamed = Streamed(folder, layers, rate)
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / torch.cuda.mem_get_info()[1])
    # torch pins a layer in a power of two of bytes.
    pinned = 2 * sum(path.stat().st_size for path in folder.iterdir())
    for offload, share in (("disk", 0.5), ("cpu", 1.0)):
        free, now = available_bytes(torch.device("cpu")), time.monotonic()
        if offload == "cpu" and free < pinned:
            phase.skip(f"offload cpu: {pinned / 1e9:.0f} GB of RAM needed, {free / 1e9:.0f} free")
            continue
        try:
            streamed.measure(offload, phase, now + share * (phase.deadline - now))
        except Exception as error:
            phase.failed(f"offload {offload}", error)
    phase.note("done")


if __name__ == "__main__":
    main()
