"""Time the default recipe on a 1B model from disk to disk, phase by phase.

The model has Llama-3.2-1B's shape and random weights; it is scored and refitted on 128 samples of
1024 tokens, and a fifth of its neurons is removed. Phases are those of `bench_recipe.py`. What is
between them, such as reading and checks, is the row "all" less the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_phase
import numpy as np
import torch
from bench_recipe import observed
from gpu_phase import SEQ_LEN, Phase
from meter import DEVICE, GPU, clock_s
from models import Shape, random_ids, write_checkpoint
from records import row

import hfprune_fast as hf

SHAPE = Shape(2048, 8192, 16, 32, 8, 128_256) if GPU else Shape(64, 160, 3, 4, 2, 500)
SAMPLES = 128 if GPU else 4
MODEL = "Llama-3.2-1B" if GPU else ""
TOKENS = SAMPLES * SEQ_LEN


def main() -> None:
    phase = Phase(*sys.argv[1:])  # of gpu_check.py: the file, the seconds
    folder = phase.out.parent / "recipe"  # which gpu_check.py removes, however this ends
    folder.mkdir()
    phase.note("the checkpoint")
    write_checkpoint(folder / "model", SHAPE, SHAPE.layers, device=DEVICE)
    calibration: Path = folder / "ids.npy"
    np.save(calibration, random_ids(SAMPLES, SEQ_LEN, SHAPE.vocab).numpy())

    def add(name: str, begin: float) -> None:
        ms = 1e3 * (clock_s() - begin)
        peak = torch.cuda.max_memory_allocated() if GPU else 0
        identity = gpu_phase.identity("default_recipe", SHAPE, TOKENS, name, MODEL)
        found = row(identity | {"computes": "fisher"}, [ms], [], floor="", peak_bytes=peak)
        phase.rows.append(found)
        phase.note(f"{name}: {ms / 1e3:.2f} s, {peak / 1e9:.2f} GB")

    def timed(name: str, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        begin = clock_s()
        result = part(*args, **kwargs)
        add(name, begin)
        return result

    begin = time.perf_counter()
    with observed(timed):
        hf.oneshot(
            folder / "model", calibration, folder / "out", prune_ratio=0.2, samples=SAMPLES,
            seq_len=SEQ_LEN,
        )  # fmt: skip
    add("all", begin)
    phase.note("done")


if __name__ == "__main__":
    main()
