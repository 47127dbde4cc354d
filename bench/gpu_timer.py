"""Times of calls on the device, and what else differs between a GPU and a rehearsal.

Without a GPU all sizes are tiny, times are the host's and kernels are interpreted: a rehearsal,
whose numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.kernels._dispatch import architecture

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Norm-wise, against the torch backend in bf16; a store rounds by up to 2^-8.
MAX_ERROR = 2e-2

Tensors = tuple[Tensor, ...]


def size(n: int) -> int:
    return n if GPU else max(2, n // 256)


def times_ms(call: Callable[[], object], refill: Callable[[], object], count: int) -> list[float]:
    """Times of count calls, each after refill and with nothing of its inputs in the cache."""
    if not GPU:
        times = []
        for _ in range(count):
            refill()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    other = torch.empty(128 << 20, dtype=torch.float32, device=DEVICE)  # 512 MiB
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    # The device spins, 0.5 ms a call at 2 GHz, while the host queues all calls, so that no time
    # includes waiting for the host.
    torch.cuda._sleep(count * 1_000_000)
    for start, end in events:
        refill()
        other.amax()  # reads, so that no dirty line of the refill is left to be written back
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def seconds(call: Callable[[], object]) -> float:
    """Of one call, by the host's clock, until the device has done all of it."""
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak of the memory a call takes beside its inputs; what it returns counts."""
    if not GPU:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_info() -> dict[str, Any]:
    if not GPU:
        return {"name": "rehearsal: no GPU, numbers mean nothing"}
    properties = torch.cuda.get_device_properties(DEVICE)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": architecture(DEVICE),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": total,
        "free_bytes": free,
    }


def best_count(call: Callable[[], object], refill: Callable[[], object], budget_ms: float) -> int:
    """How many calls fit the budget, after two to warm up."""
    for _ in range(2):
        refill()
        call()
    once = times_ms(call, refill, 1)[0]
    return max(5, min(50, int(budget_ms / once))) if GPU else 1


def summary(rounds: list[list[float]]) -> dict[str, Any]:
    times = [t for one in rounds for t in one]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "median_ms": middle,
        "min_ms": min(times),
        "iqr_ms": high - low,
        "calls": len(times),
        "round_medians_ms": [statistics.median(one) for one in rounds],
    }


def time_all(
    calls: dict[str, Callable[[], object]], refill: Callable[[], object], budget_ms: float = 300
) -> dict[str, dict[str, Any]]:
    """Two rounds of each, one provider after the other, so that a drift of clocks meets all."""
    counts = {name: best_count(call, refill, budget_ms) for name, call in calls.items()}
    rounds = [
        {name: times_ms(call, refill, counts[name]) for name, call in calls.items()}
        for _ in range(2)
    ]
    return {name: summary([one[name] for one in rounds]) for name in calls}


def relative_error(got: Tensors, want: Tensors) -> float:
    """The largest ‖got - want‖ / ‖want‖ of the pairs, NaN if there is one."""
    errors = []
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        difference = size_squared = 0.0
        width = w.shape[-1] if w.dim() else 1
        pairs = zip(*(t.reshape(-1, width).split(512) for t in (g, w)), strict=True)
        for g_rows, w_rows in pairs:
            difference += float((g_rows.double() - w_rows.double()).square().sum())
            size_squared += float(w_rows.double().square().sum())
        errors.append((difference / size_squared) ** 0.5)
    return float(torch.tensor(errors).max())


def check(got: Tensors, want: Tensors) -> float:
    """The relative error; raises where it is not that of rounding alone."""
    error = relative_error(got, want)
    if not error <= MAX_ERROR:
        raise ValueError(f"differs from the torch backend by {error:.1e} of its norm")
    return error
