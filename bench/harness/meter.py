"""Times and memory of calls on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Call = Callable[[], object]


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def clock_s() -> float:
    """The host's clock once the device has done all that it was given."""
    synchronize()
    return time.perf_counter()


class Evictor:
    """Leaves nothing of a call's inputs in the caches: it goes through more than they hold."""

    def __init__(self) -> None:
        self.other = torch.ones((512 if GPU else 64) << 18, dtype=torch.float32, device=DEVICE)

    def __call__(self) -> None:
        # It reads, so that no dirty line is left to be written back.
        self.other.amax()


def alternated_ms(
    call: Call, floor: Call, ready: Call, rounds: int
) -> tuple[list[float], list[float]]:
    """Times of floor() and call() in turn, each after ready().

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
    # The device spins, 1 ms a round at 2 GHz, while the host queues all, so that no time includes
    # waiting for the host.
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
    """The most that the tensors made by a call take at once; what it returns counts.

    On a GPU as torch's allocator has it, on a CPU from the profiler's record of each allocation:
    both are counted, not sampled. What libraries take past torch's allocators is not in it.
    """
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
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
    """How many calls fit the budget, after one to warm up."""
    ready()
    call()
    ready()
    begin = clock_s()
    call()
    return max(least, min(most, int(budget_s / max(clock_s() - begin, 1e-9))))
