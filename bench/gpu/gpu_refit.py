"""Time removal costs and a refit of one layer of an 8B model's shape, D 4096 and F 14336.

A fifth of its neurons is removed. Costs must be finite and not negative, and a refit that keeps
every neuron must return the weights it was given, but for their rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu_phase import BF16, LLAMA_8B, SEQ_LEN, Phase, U, identity, milliseconds
from meter import DEVICE, GPU, peak_bytes
from models import Shape, random_ids, random_model, relative_errors
from records import row
from torch import Tensor

from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.pruning.refit import refit
from hfprune_fast.scoring.costs import removal_costs

SHAPE = Shape(4096, 14336, 1, 32, 8, 32000) if GPU else Shape(64, 160, 1, 4, 2, 500)
SEQUENCES, BATCH, ROUNDS = (32 if GPU else 8), 4, 3
TOKENS = SEQUENCES * SEQ_LEN


def main() -> None:
    phase = Phase(*sys.argv[1:])  # of gpu_check.py: the file, the seconds
    model = ResidentModel(random_model(SHAPE, BF16, DEVICE))
    ids = random_ids(SEQUENCES, SEQ_LEN, SHAPE.vocab)
    batches = micro_batch(ids, SHAPE.vocab).split(BATCH)
    everything = torch.arange(SHAPE.width)
    keep = everything[torch.rand(SHAPE.width) < 0.8]

    def fitted(kept: Tensor) -> Tensor:
        with model as entered:
            return refit(entered, batches, [{0: kept}])[0][0].weights[0]

    def costs() -> Tensor:
        with model as entered:
            return removal_costs(entered, batches)

    def add(op: str, call: Callable[[], object], flops: int, **checked: Any) -> None:
        times_ms: list[float] = []
        while not times_ms or (len(times_ms) < ROUNDS and not phase.late):
            times_ms.append(milliseconds(call))
        found = identity(op, SHAPE, TOKENS, "ours", LLAMA_8B)
        peak = peak_bytes(call) if GPU and not phase.late else 0
        found = row(found, times_ms, [], floor="", flops=flops, peak_bytes=peak, **checked)
        phase.rows.append(found)
        phase.note(f"{op}: {times_ms}")

    width, kept = SHAPE.width, len(keep)
    phase.note("the layer")
    found = costs()  # which warms up, too
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError("a removal costs less than nothing, or NaN")
    add("removal_costs", costs, 2 * TOKENS * width**2 + 4 * width**3)
    weight = model.parts.mlps[0].down.weight
    error = float(relative_errors(fitted(everything).flatten()[None], weight.flatten()[None]))
    if not error <= 2 * U:
        raise ValueError(f"refit: weights are off by {error:.1e} where every neuron is kept")
    flops = 2 * TOKENS * kept * (kept + SHAPE.hidden) + kept**3 // 3 + 2 * kept**2 * SHAPE.hidden
    add("refit", lambda: fitted(keep), flops, error=error, error_allowed=2 * U)


if __name__ == "__main__":
    main()
