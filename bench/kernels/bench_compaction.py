"""Compaction of weights beside numpy, torch and memcpy, and that of checkpoints beside cp.

    .venv/bin/pytest bench/kernels/bench_compaction.py --small

A fifth of the rows or columns is dropped. The floor is a copy of the kept bytes, or `cp` of the
pruned files and a sync. Peak memory is what torch allocates: the scratch of the C++ extension, half
a megabyte, and numpy's own are not in it. HFPRUNE_BENCH_BYTES is the size of the checkpoint.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from case import Case, Provider, Results, WrongError
from meter import PeakMemory, alternated_ms
from models import Shape, into_page_cache, write_checkpoint
from records import row
from shapes import Spec
from torch import Tensor

import hfprune_fast
from hfprune_fast.checkpoint import native

KEPT = 0.8
BYTES = {"full": 2_000_000_000, "small": 1_000_000_000, "tiny": 0}
SHAPE = Shape(2048, 8192, 0, 32, 8, 32000)
TINY = Shape(32, 48, 0, 4, 2, 500)


def random_keep(size: int, seed: int) -> Tensor:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: int(KEPT * size)].sort().values


class Weight(Case):
    """A weight on the host, what is kept of it, and buffers whose pages have all been touched."""

    computes = "bytes"
    letters, dtypes, small = "DF", ("bfloat16",), ("Llama-3.1-8B",)
    most_rounds = 15
    on_gpu = False
    axis = 0

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        shape = (spec.sizes["F"], spec.sizes["D"])
        self.pristine = torch.empty(shape[:: 1 if self.axis == 0 else -1], dtype=self.dtype)
        self.pristine.uniform_(-1, 1)
        self.keep = random_keep(spec.sizes["F"], seed=0)
        self.want = self.pristine.index_select(self.axis, self.keep)
        self.weight, self.out = self.pristine.clone(), self.want.clone()
        bits = {2: torch.int16, 4: torch.int32}[self.dtype.itemsize]
        self.weight_np, self.out_np = (t.view(bits).numpy() for t in (self.weight, self.out))
        self.mask_np = np.isin(np.arange(spec.sizes["F"]), self.keep)
        self.bytes_moved = 2 * self.want.nbytes  # each kept byte is read once and written once

    def refill(self) -> None:
        self.weight.copy_(self.pristine)
        self.out.fill_(torch.nan)

    def ready(self) -> None:
        super().ready()
        time.sleep(0.03)  # torch's threads wait for more by spinning, on a core of the next call

    def floor(self) -> None:
        self.out.copy_(self.want)

    def truth(self, computes: str) -> Results:
        return {"kept": self.want}

    def run(self, function: Callable[..., Any]) -> Results:
        return {"kept": torch.as_tensor(function(self))}

    def check(
        self, provider: Provider, results: Results, *, complete: bool = False
    ) -> tuple[float, float]:
        if not torch.equal(results["kept"].view(torch.uint8), self.want.view(torch.uint8)):
            raise WrongError("the kept bytes are others")
        return 0.0, 0.0

    def compact(self, **out: Tensor) -> Tensor:
        function = native.compact_columns if self.axis else native.compact_rows
        return function(self.weight, self.keep, **out)


class Columns(Weight):
    axis = 1


def by(function: Callable[[Any], Any]) -> Provider:
    return Provider(lambda case: partial(case.run, function))


Weight.PROVIDERS = {
    "ours, in place": by(Weight.compact),
    "ours, out=": by(lambda w: w.compact(out=w.out)),
    "index_select": by(lambda w: torch.index_select(w.weight, w.axis, w.keep)),
    "index_select, out=": by(lambda w: torch.index_select(w.weight, w.axis, w.keep, out=w.out)),
    # With its default mode, "raise", take() makes a copy of out.
    "numpy.take, out=": by(lambda w: np.take(w.weight_np, w.keep, w.axis, w.out_np, mode="clip")),
    "numpy.compress, out=": by(lambda w: np.compress(w.mask_np, w.weight_np, w.axis, w.out_np)),
}
CASES = {"compact_rows": Weight, "compact_columns": Columns}


def test_compaction(case: Case, provider: str, measure: Callable[..., None]) -> None:
    measure(case, provider)


@pytest.mark.timeout(1800)
def test_prune_checkpoint(scale: str, report: Callable[..., None], checkpoint_folder: Path) -> None:
    source, pruned, out, copy = (checkpoint_folder / n for n in ("source", "pruned", "out", "copy"))
    shape = TINY if scale == "tiny" else SHAPE
    size = int(os.environ.get("HFPRUNE_BENCH_BYTES", BYTES[scale]))
    layers = max(2, (size - 4 * shape.head_params) // (2 * shape.layer_params))
    write_checkpoint(source, shape, layers)
    keep = {layer: random_keep(shape.width, seed=layer) for layer in range(layers)}
    with PeakMemory() as memory:
        hfprune_fast.prune_checkpoint(source, pruned, keep)
    hfprune_fast.prune_checkpoint(source, out, keep, verify=True)

    def prepare() -> None:
        for target in (out, copy):
            shutil.rmtree(target, ignore_errors=True)
        for folder in (source, pruned):
            into_page_cache(folder)
        os.sync()

    def prune() -> None:
        hfprune_fast.prune_checkpoint(source, out, keep)
        os.sync()

    copied = ["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync', pruned, copy]
    floor = partial(subprocess.run, copied, check=True)
    times_ms, floors_ms = alternated_ms(prune, floor, prepare, 3 if size else 1, on_gpu=False)
    identity = {
        "op": "prune_checkpoint", "model": "", "dtype": "bfloat16", "provider": "ours",
        "sizes": {**shape.sizes, "L": layers}, "computes": "bytes",
    }  # fmt: skip
    report(row(
        identity, times_ms, floors_ms, floor="cp", error=0.0, error_allowed=0.0,
        bytes_moved=2 * sum(path.stat().st_size for path in pruned.iterdir()),
        **memory.fields,
    ))  # fmt: skip
