"""Times and memory of calls, of the process too, and what the device at hand does at best."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from shapes import product_dtypes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Call = Callable[[], object]


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def clock_s() -> float:
    """Return the host's clock after the device has finished."""
    synchronize()
    return time.perf_counter()


class Evictor:
    """Empties the caches: reads more bytes than they hold."""

    def __init__(self) -> None:
        self.other = torch.ones((512 if GPU else 64) << 18, dtype=torch.float32, device=DEVICE)

    def __call__(self) -> None:
        # A read, so that no dirty line is left to be written back.
        self.other.amax()


def alternated_ms(
    call: Call, floor: Call, ready: Call, rounds: int, on_gpu: bool = GPU
) -> tuple[list[float], list[float]]:
    """Time call() and floor() alternately, each after ready().

    On a GPU the host is ahead, so that launches cost nothing, unless a call waits for the device
    (Liger's does): what it then launches is timed at the host's speed.
    """
    marks: list[Any] = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()

    if on_gpu:
        # The device spins, 1 ms a round at 2 GHz, while the host queues everything, so that no time
        # includes waiting for the host.
        torch.cuda._sleep(rounds * 2_000_000)
    for timed in (call, floor) * rounds:
        ready()
        mark()
        timed()
        mark()
    synchronize()
    pairs = zip(marks[::2], marks[1::2], strict=True)
    times = [a.elapsed_time(b) if on_gpu else 1e3 * (b - a) for a, b in pairs]
    return times[::2], times[1::2]


def peak_bytes(call: Call) -> int:
    """Return the most that the tensors made by a call take at once, its result included.

    On a GPU from torch's allocator, on a CPU from the profiler's record of each allocation:
    counted, not sampled. What libraries allocate past torch is not in it.
    """
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        result = call()
    del result
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((change.nbytes() for change in changes), initial=0))


class PeakMemory:
    """Inside it, a thread keeps the largest RssAnon and RssFile over those at its beginning."""

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)
        self.peak = self.base = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        taken = (peak - base for peak, base in zip(self.peak, self.base, strict=True))
        self.fields = dict(zip(("peak_bytes", "mapped_bytes"), taken, strict=True))

    @staticmethod
    def now() -> list[int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        return [1024 * int(kib[name]) for name in ("RssAnon", "RssFile")]

    def sample(self) -> None:
        while not self.stop.wait(0.002):
            self.peak = list(map(max, self.peak, self.now()))


def rounds_for(call: Call, ready: Call, budget_s: float, least: int, most: int) -> int:
    """Return how many calls, of one that is warm, fit the budget."""
    ready()
    begin = clock_s()
    call()
    return max(least, min(most, int(budget_s / max(clock_s() - begin, 1e-9))))


def ceilings(scale: str, dtypes: tuple[str, ...] = ()) -> list[dict[str, float | str]]:
    """Measure the rates of a copy, whose bytes count as read and as written, and of a product.

    dtypes: by default all that this machine multiplies in.
    The copied data are random: a GPU compresses zeros on their way to memory.
    """
    n = {"full": 8192, "small": 2048, "tiny": 64}[scale]
    size = {"full": 1 << 29, "small": 1 << 25, "tiny": 1 << 12}[scale]
    source = torch.rand(size, device=DEVICE)
    target, evict = torch.empty_like(source), Evictor()
    found: list[dict[str, float | str]] = []
    for name in dtypes or product_dtypes():
        a, b = torch.randn(2, n, n, device=DEVICE).to(getattr(torch, name))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        copy = partial(target.copy_, source)
        product_ms, copy_ms = alternated_ms(product, copy, evict, rounds=20 if GPU else 7)
        copied = 2 * source.nbytes / statistics.median(copy_ms) / 1e6
        made = 2 * n**3 / statistics.median(product_ms) / 1e6
        found.append({"dtype": name, "copy_gb_per_s": copied, "product_gflop_per_s": made})
    return found
