"""What the phases of `gpu_check.py` that score whole models share."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meter import DEVICE, GPU, clock_s

BF16 = torch.bfloat16
SEQ_LEN = 1024 if GPU else 32
# Left free on a disk that a checkpoint is written to.
SPARE_BYTES = 8 << 30 if GPU else 0


class Progress:
    """What a phase that scores has found so far; its JSON file is kept up to date."""

    def __init__(self, phase: str, out: Path, limit_s: float) -> None:
        self.phase, self.out = phase, out
        self._begun = time.monotonic()
        self.deadline = self._begun + limit_s  # nothing new is started after it
        self.result: dict[str, Any] = {"rows": [], "skipped": [], "errors": []}

    @classmethod
    def from_arguments(cls, phase: str, description: str | None) -> Progress:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
        parser.add_argument("--seconds", type=float, default=100, help="start nothing new after")
        args = parser.parse_args()
        if not GPU:
            torch.set_num_threads(1)  # which serves a rehearsal's sizes best
        return cls(phase, args.out, args.seconds)

    def note(self, what: str) -> None:
        print(f"{time.monotonic() - self._begun:6.1f} s  {what}", flush=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps({self.phase: self.result}))
        part.replace(self.out)

    def failed(self, what: str, error: Exception) -> None:
        """Keep an error and go on."""
        text = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.result["errors"].append(text)
        self.note(text)
        if GPU:
            torch.cuda.empty_cache()


def evict(folder: Path) -> None:
    """Have the system forget what it holds of a folder's files, so that they are read anew."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def filesystem(folder: Path) -> str:
    """The kind of the file system that a folder is on; tmpfs, say, is no disk."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(mount, kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return max(above, key=lambda found: len(found[0]))[1]


def products() -> tuple[Callable[[], object], int]:
    """The yardstick: a call that makes some large bf16 products, and their FLOPs."""
    n, count = (8192, 50) if GPU else (32, 2)
    a, b = torch.randn(2, n, n, dtype=BF16, device=DEVICE)
    out = torch.empty_like(a)

    def call() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return call, count * 2 * n**3


def seconds(call: Callable[[], object]) -> float:
    """Of one call, by the host's clock, until the device has done all of it."""
    begin = clock_s()
    call()
    return clock_s() - begin


def gemm_tflops() -> float:
    """The rate of `products`, after a call to warm up."""
    call, flops = products()
    call()
    return flops / statistics.median(seconds(call) for _ in range(5)) / 1e12
