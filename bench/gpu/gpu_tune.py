"""Sweep the configurations of the kernels: each is checked at a small shape, and then timed."""

from __future__ import annotations

import statistics
import time
from itertools import product
from typing import Any
from unittest import mock

from case import told
from gpu_phase import Phase
from gpu_timing import CASES, OURS, SCALE, SUITES, has_target
from meter import DEVICE, GPU, alternated_ms, rounds_for
from records import Row
from shapes import Spec

from hfprune_fast.kernels import _rows as rows_module
from hfprune_fast.kernels import taylor as taylor_module
from hfprune_fast.kernels._dispatch import architecture, configuration

AXES = {
    "softmax_entropy_grad": {
        "BLOCK_V": (4096, 8192, 16384), "STAGES": (2, 3, 4), "num_warps": (8, 16, 32),
    },
    "gated_taylor": {
        "BLOCK_T": (4, 8, 16), "BLOCK_F": (64, 128, 256), "STAGES": (2, 3, 4),
        "num_warps": (2, 4, 8), "maxnreg": (96, 128, 168),
    },
}  # fmt: skip
MODULES = {"softmax_entropy_grad": rows_module, "gated_taylor": taylor_module}
# The small shapes differ from the others in nothing that a kernel is compiled for.
SMALL = {"softmax_entropy_grad": {"T": 33}, "gated_taylor": {"T": 288}}


def candidates(op: str) -> list[dict[str, int]]:
    """Return the configuration in use, then others, those that differ in least first."""
    current = configuration(MODULES[op]._CONFIGS, DEVICE)
    axes = {name: of for name, of in AXES[op].items() if name in current}  # AMD has no maxnreg
    found = [current, *(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))]
    found.sort(key=lambda config: sum(config[name] != current[name] for name in axes))
    unique = [config for i, config in enumerate(found) if config not in found[:i]]
    return unique if GPU else unique[:3]


def tuned(op: str, deadline: float) -> list[Row]:
    """Return every candidate, best first."""
    spec = next(s for suite in SUITES for s in suite.specs(SCALE) if s.op == op and has_target(s))
    case, small = CASES[op](spec), CASES[op](Spec(op, "", spec.dtype, spec.sizes | SMALL[op]))
    provider, module = case.PROVIDERS[OURS], MODULES[op]
    current = configuration(module._CONFIGS, DEVICE)
    results: list[Any] = []
    for config in candidates(op):
        results.append({"config": config, "current": config == current})
        if time.monotonic() > deadline:
            results[-1]["error"] = "out of time"
            continue
        with mock.patch.dict(module._CONFIGS, {architecture(DEVICE): config}):
            try:
                small.refill()
                results[-1]["error_norm"] = small.check(provider, provider.make(small)())[0]
                call = provider.make(case)
                rounds = rounds_for(call, case.ready, 0.04, 5, 50) if GPU else 1
                times_ms, _ = alternated_ms(call, case.floor, case.ready, rounds)
                results[-1]["median_ms"] = statistics.median(times_ms)
            except Exception as error:  # too much shared memory, a compiler's error: not this one
                results[-1]["error"] = told(error)
    return sorted(results, key=lambda result: float(result.get("median_ms", "inf")))


def main() -> None:
    phase = Phase.from_arguments(__doc__)
    halfway = (time.monotonic() + phase.deadline) / 2
    for op, deadline in zip(MODULES, (halfway, phase.deadline), strict=True):
        phase.result.setdefault("tuned", {})[op] = tuned(op, deadline)
        phase.note(op)


if __name__ == "__main__":
    main()
