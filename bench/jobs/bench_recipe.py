"""The default recipe, phase by phase: its time, and its products at the rate of a large one.

    .venv/bin/pytest bench/jobs/bench_recipe.py --small

A fifth of the neurons of a random model is removed in a process of its own: once timed, and once
with the products counted, which takes longer. Both must keep the same neurons.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from meter import PeakMemory, ceilings
from models import Shape, random_ids, write_checkpoint
from records import row
from torch.utils.flop_counter import FlopCounterMode
from workers import apart

import hfprune_fast as hf

SHAPES = {
    "full": Shape(1024, 3072, 8, 16, 8, 32000),
    "small": Shape(512, 1376, 4, 8, 4, 32000),
    "tiny": Shape(32, 64, 2, 4, 2, 500),
}
SAMPLES = {"full": 64, "small": 8, "tiny": 4}
SEQ_LEN = {"full": 512, "small": 512, "tiny": 64}
# Each phase, and the function that it is.
PHASES = {
    "scoring": "hfprune_fast.scoring.job.score_batches",
    "removal costs": "hfprune_fast.scoring.job.removal_costs",
    "allocation": "hfprune_fast.pruning.allocation.choose",
    "refit": "hfprune_fast.pruning.oneshot.refit_stored",
    "writing": "hfprune_fast.pruning.oneshot.prune_checkpoint",
}
aten = torch.ops.aten
# What torch does not count.
COUNTS: dict[Any, Callable[..., int]] = {
    aten.mv: lambda a, *_, **__: 2 * prod(a),
    aten.linalg_cholesky_ex: lambda a, *_, **__: a[-1] ** 3 // 3,
    aten.cholesky_inverse: lambda a, *_, **__: 2 * a[-1] ** 3 // 3,
    aten.cholesky_solve: lambda b, a, *_, **__: 2 * a[-1] ** 2 * b[-1],
}


@contextmanager
def observed(around: Callable[..., Any]) -> Iterator[None]:
    """Run each phase as `around(name, phase, arguments...)`."""
    with ExitStack() as patches:
        for name, function in PHASES.items():
            patches.enter_context(patch(function, partial(around, name, resolve_name(function))))
        yield


def phases(folder: Path, calibration: Path, seq_len: int, dtype: str) -> list[dict[str, Any]]:
    """What a worker runs: the recipe timed, then counted; return what was found of each phase."""
    found: list[dict[str, Any]] = []
    flops: dict[str, int] = {}

    def timed(name: str, phase: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (rate,) = ceilings("small" if seq_len > 64 else "tiny", (dtype,))  # just now
        with PeakMemory() as memory:
            begin = time.perf_counter()
            result = phase(*args, **kwargs)
            ms = 1e3 * (time.perf_counter() - begin)
        found.append({"provider": name, "ms": ms, "rate": rate["product_gflop_per_s"]})
        found[-1]["memory"] = memory.fields
        return result

    def counted(name: str, phase: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
            result = phase(*args, **kwargs)
        flops[name] = counter.get_total_flops()
        return result

    written = []
    for around, name in ((timed, "timed"), (counted, "counted")):
        out = folder.parent / name
        with observed(around):
            hf.oneshot(
                folder, calibration, out, prune_ratio=0.2, seq_len=seq_len, device="cpu",
                dtype=dtype,
            )  # fmt: skip
        written.append({file.name: file.read_bytes() for file in out.glob("*.safetensors")})
    if written[0] != written[1]:
        raise ValueError("two runs of one recipe gave different models")
    return [{**each, "flops": flops[each["provider"]]} for each in found]


@pytest.mark.timeout(1800)
def test_default_recipe(scale: str, report: Callable[..., None], checkpoint_folder: Path) -> None:
    shape, samples, seq_len = SHAPES[scale], SAMPLES[scale], SEQ_LEN[scale]
    folder, calibration = checkpoint_folder / "model", checkpoint_folder / "ids.npy"
    write_checkpoint(folder, shape, shape.layers)
    np.save(calibration, random_ids(samples, seq_len, shape.vocab).numpy())
    dtype = "float32"
    found = apart(
        "bench_recipe:phases", folder=folder, calibration=calibration, seq_len=seq_len, dtype=dtype
    )
    assert [each["provider"] for each in found] == list(PHASES)
    params = shape.layers * shape.layer_params + 2 * shape.head_params
    for each in found:
        sizes = {"T": samples * seq_len, **shape.sizes, "params": params}
        identity = {
            "op": "default_recipe", "dtype": dtype, "model": "", "sizes": sizes,
            "provider": each["provider"], "computes": "fisher",
        }  # fmt: skip
        floors_ms = [each["flops"] / each["rate"] / 1e6] if each["flops"] else []
        report(row(
            identity, [each["ms"]], floors_ms, floor="products", flops=each["flops"],
            error=0.0, error_allowed=0.0, **each["memory"],
        ))  # fmt: skip
