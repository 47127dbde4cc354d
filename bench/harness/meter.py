"""Times and memory of calls on the device at hand, and what the device does at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from shapes import DTYPES

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
    call: Call, floor: Call, ready: Call, rounds: int
) -> tuple[list[float], list[float]]:
    """Time call() and floor() alternately, each after ready().

    On a GPU the host is ahead, so that launches cost nothing, unless a call waits for the device
    (Liger's does): what it then launches is timed at the host's speed.
    """
    if not GPU:
        times: dict[Call, list[float]] = {floor: [], call: []}
        for _ in range(rounds):
            for timed in (floor, call):
                ready()
                begin = time.perf_counter()
                timed()
                times[timed].append(1e3 * (time.perf_counter() - begin))
        return times[call], times[floor]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in range(rounds)]
    # The device spins, 1 ms a round at 2 GHz, while the host queues everything, so that no time
    # includes waiting for the host.
    torch.cuda._sleep(rounds * 2_000_000)
    for begin, end, call_begin, call_end in events:
        for timed, before, after in ((floor, begin, end), (call, call_begin, call_end)):
            ready()
            before.record()
            timed()
            after.record()
    torch.cuda.synchronize()
    floors = [begin.elapsed_time(end) for begin, end, _, _ in events]
    return [begin.elapsed_time(end) for _, _, begin, end in events], floors


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
    live = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak


def rounds_for(call: Call, ready: Call, budget_s: float, least: int, most: int) -> int:
    """Return how many calls fit the budget, after one to warm up."""
    ready()
    call()
    ready()
    begin = clock_s()
    call()
    return max(least, min(most, int(budget_s / max(clock_s() - begin, 1e-9))))


def ceilings(scale: str, dtypes: tuple[str, ...] = DTYPES) -> list[dict[str, float | str]]:
    """Measure the rates of a copy, whose bytes count as read and as written, and of a product.

    The copied data are random: a GPU compresses zeros on their way to memory.
    """
    n = {"full": 8192, "small": 2048, "tiny": 64}[scale]
    size = {"full": 1 << 29, "small": 1 << 25, "tiny": 1 << 12}[scale]
    source = torch.rand(size, device=DEVICE)
    target, evict = torch.empty_like(source), Evictor()
    found: list[dict[str, float | str]] = []
    for name in dtypes:
        a, b = torch.randn(2, n, n, device=DEVICE).to(getattr(torch, name))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        copy = partial(target.copy_, source)
        product_ms, copy_ms = alternated_ms(product, copy, evict, rounds=20 if GPU else 7)
        copied = 2 * source.nbytes / statistics.median(copy_ms) / 1e6
        made = 2 * n**3 / statistics.median(product_ms) / 1e6
        found.append({"dtype": name, "copy_gb_per_s": copied, "product_gflop_per_s": made})
    return found
