"""What the machine offers: free memory, and the speed of a matrix product."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from hfprune_fast.engine.distributed import local_processes

_CGROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself


def product_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Time a small matrix product and return its speed."""
    # Small on a CPU, where torch may lack a fast bfloat16 product and a large one takes seconds.
    n = 1024 if device.type == "cuda" else 256
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free for this process on a device; of a host's, its share."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        capped = total * torch.cuda.get_per_process_memory_fraction(device)
        return int(min(free + cached, capped - torch.cuda.memory_allocated(device)))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        limits = [int(fields["MemAvailable"].split()[0]) * 1024]
    except OSError:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:  # a container's own limit, which counts cached files as well
        limit, used = (int((_CGROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        limits.append(limit - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no limit is set, or it is "max"
        pass
    return max(0, min(limits)) // local_processes()
