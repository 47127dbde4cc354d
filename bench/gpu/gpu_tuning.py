"""Time every kernel under other launch configurations than the one in use.

    python bench/gpu/gpu_check.py --only tuning --out DIR

Each configuration is compiled first, in as many processes as there are cores, over few tokens; it
must then be right, as every row of the suites. What a run taught goes into `results/NOTES.md`, and
the fastest into the kernel's own table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
from case import Case, measured
from gpu_phase import Phase
from gpu_timing import CASES, OURS
from meter import GPU
from shapes import MODELS, Spec

KERNELS = "hfprune_fast.kernels."
ROWS, SHARED, KL = (
    KERNELS + name
    for name in (
        "_rows_triton:_CONFIGS", "_rows_triton:_SHARED_CONFIGS", "_kl_rows_triton:_CONFIGS",
    )
)  # fmt: skip
TAYLOR, NORM = KERNELS + "_statistics_triton:_CONFIGS", KERNELS + "_rms_norm_triton:_TILE"
Choice = tuple[str, str, str, Any]  # operation, model, what is replaced, by what


def lanes(number: int, warps: int, **more: int) -> dict[str, int]:
    return {"LANES": number, "num_warps": warps, **more}


def tile(tokens: int, neurons: int, stages: int, warps: int, **more: int) -> dict[str, int]:
    return {"BLOCK_T": tokens, "BLOCK_F": neurons, "STAGES": stages, "num_warps": warps, **more}


LONG = (
    lanes(1024, 32, maxnreg=64), lanes(1024, 32), lanes(1024, 16), lanes(512, 16),
    lanes(512, 16, maxnreg=64), lanes(512, 8), lanes(256, 8), lanes(2048, 32, maxnreg=64),
)  # fmt: skip
SHORT = (
    lanes(512, 16), lanes(1024, 32, maxnreg=64), lanes(256, 8), lanes(512, 8), lanes(128, 4),
    lanes(512, 16, maxnreg=64),
)  # fmt: skip
TILES = (
    tile(8, 128, 3, 4, maxnreg=128), tile(8, 128, 2, 4, maxnreg=128),
    tile(8, 128, 4, 4, maxnreg=128), tile(8, 128, 3, 4), tile(4, 256, 3, 4, maxnreg=128),
    tile(8, 256, 3, 8, maxnreg=128), tile(16, 128, 3, 8, maxnreg=128),
    tile(16, 128, 2, 8, maxnreg=128), tile(4, 128, 4, 2, maxnreg=128),
    tile(8, 64, 3, 2, maxnreg=128), tile(16, 64, 3, 4, maxnreg=128), tile(16, 256, 2, 16),
)  # fmt: skip
GRAD = "softmax_entropy_grad"
CHOICES: tuple[Choice, ...] = (
    *((GRAD, "Llama-3.1-8B", ROWS, config) for config in LONG),
    *((GRAD, "Qwen2.5-7B", ROWS, config) for config in LONG[:4]),
    *((GRAD, "Llama-2-7B", SHARED, config) for config in SHORT),
    *(("softmax_entropy", "Llama-3.1-8B", ROWS, config) for config in LONG),
    *(("gated_taylor", "Llama-3.1-8B", TAYLOR, config) for config in TILES),
    *(("taylor_statistics", "Llama-3.1-8B", TAYLOR, config) for config in TILES),
    *(("linear_kl", "Llama-3.1-8B", KL, config) for config in LONG[:6]),
    *(("rms_norm", "Llama-3.1-8B", NORM, number) for number in (2048, 4096, 8192)),
)


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    _, _, name, value = choice
    place = resolve_name(name)
    if isinstance(place, dict):
        with patch.dict(place, sm=value):
            yield
    else:
        with patch(name.replace(":", "."), value):
            yield


def spec_of(choice: Choice, tokens: int) -> Spec:
    op, model, *_ = choice
    widths = MODELS[model] if GPU else (16, 48, 500)
    sizes = dict(zip("TDFV", (tokens, *widths), strict=True))
    return Spec(op, model, "bfloat16", {letter: sizes[letter] for letter in CASES[op].letters})


def compile_one(index: int) -> None:
    """Launch the configuration once, over few tokens; what fails here fails again when timed."""
    choice = CHOICES[index]
    case = CASES[choice[0]](spec_of(choice, 256 if GPU else 24))
    with chosen(choice):
        case.PROVIDERS[OURS].make(case)()


def main() -> None:
    phase = Phase(*sys.argv[1:])  # of gpu_check.py: the file, the seconds
    indices = range(len(CHOICES)) if GPU else range(2)
    workers = min(len(indices), os.cpu_count() or 1) if GPU else 1
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for index, made in [(i, pool.submit(compile_one, i)) for i in indices]:
            if error := made.exception():
                phase.note(f"{CHOICES[index]}: {error}")
    made_of: tuple[Spec, Case] | None = None
    for index in indices:
        choice = CHOICES[index]
        if phase.late:
            phase.skip(f"{len(CHOICES) - index} configurations: out of time")
            break
        spec = spec_of(choice, 8192 if GPU else 24)
        if made_of is None or made_of[0] != spec:
            made_of = None  # before the next one takes its memory
            made_of = spec, CASES[spec.op](spec)
        with chosen(choice):
            found = measured(made_of[1], OURS)
        value = choice[3]
        named = " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        spec = replace(spec, op=f"{spec.op}, configurations")
        phase.rows.append(found | {"op": spec.op, "provider": f"ours, {named}"})
        phase.note(f"{spec}, {named}: {found.get('ms', found.get('failed'))}")
        if GPU:
            torch.cuda.empty_cache()
    phase.note("done")


if __name__ == "__main__":
    main()
