"""What every suite shares: a case with its floor, providers of its result, checked, then timed.

A provider's result is held to fp64, norm-wise: its error may be twice that of plain torch in the
same dtype and what its own dtype explains (`rounding`). What fails that is not timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from meter import (
    DEVICE,
    GPU,
    Evictor,
    alternated_ms,
    clock_s,
    peak_bytes,
    rounds_for,
    synchronize,
)
from records import Row, row
from shapes import Spec
from torch import Tensor

from hfprune_fast.kernels._triton import INTERPRETED

Results = dict[str, Tensor]
# Rows whose gradients are compared, spread over all: each is computed alone.
CHECKED_ROWS = 64
# At least so many rounds, and about so many seconds of calls, for each provider.
LEAST_ROUNDS, BUDGET_S = 5, 0.5
OUT_OF_MEMORY = "out of memory"


class AbsentError(Exception):
    """A provider that cannot run here; the reason in a line."""


class WrongError(Exception):
    """A provider whose result is not the operation's."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation's result, in a call that returns all or some of it."""

    make: Callable[[Any], Callable[[], Results]]
    computes: str = "entropy"
    # Of the error beside what plain torch's rounding explains, where a provider says it skips some.
    more_error: float = 0.0


class Case(ABC):
    """An operation's inputs at one shape, and what its results and times are held against."""

    PROVIDERS: ClassVar[dict[str, Provider]]
    floor_name: ClassVar[str] = "copy"
    bytes_moved: int = 0  # by any provider that reads its input once and writes its output once
    flops: int = 0
    most_rounds: int = 50
    summed: int = 1  # terms of a result's largest sum
    inner_dtype: torch.dtype = torch.float64  # of a coarser one that everyone's result goes through

    def __init__(self, spec: Spec) -> None:
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.evict = Evictor()
        self._judged: dict[str, tuple[Results, dict[str, float]]] = {}

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        made = torch.empty(shape, dtype=self.dtype, device=DEVICE)
        return made.normal_(std=std, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """fp32 between 0.5 and 1.5."""
        return torch.rand(shape, device=DEVICE, generator=self.generator) + 0.5

    def refill(self) -> None:  # noqa: B027 - most providers leave their input as it was
        """Undo what a call overwrote."""

    def ready(self) -> None:
        """Before each call, outside its time: fresh inputs, cold caches."""
        self.refill()
        self.evict()

    def floor(self) -> None:
        """A copy of as many bytes; cases of matrix products have their own."""
        source, target = self._copied
        target.copy_(source)

    @cached_property
    def _copied(self) -> tuple[Tensor, Tensor]:
        half = torch.zeros(self.bytes_moved // 8, dtype=torch.float32, device=DEVICE)
        return half, torch.zeros_like(half)

    @classmethod
    def providers_of(cls, spec: Spec) -> list[str]:
        """Who is measured; in a series of sizes only those whose growth is of interest."""
        in_series = ("ours", "HFPrune", "eager", "Liger", "Cut")
        return [n for n in cls.PROVIDERS if not spec.sweep or n.startswith(in_series)]

    @abstractmethod
    def truth(self, computes: str) -> Results:
        """The result in fp64, written plainly; of per-row results those of `spread_rows`."""

    @abstractmethod
    def plain(self, computes: str) -> Results:
        """The same by plain torch in the case's dtype."""

    def sampled(self, results: Results) -> Results:
        """The part of a provider's results that truth and plain have."""
        return results

    def judged(self, computes: str) -> tuple[Results, dict[str, float]]:
        """The truth, and twice the error of plain torch in each part of a result."""
        if computes not in self._judged:
            truth, plain = self.truth(computes), self.plain(computes)
            allowed = {name: 2 * error_of(plain[name], truth[name]) for name in truth}
            self._judged[computes] = truth, allowed
        return self._judged[computes]

    def rounding(self, result: Tensor) -> float:
        """What a result's own dtype explains: four roundings, and those of an fp32 sum.

        Of n terms one after the other, whose roundings are of either sign: √n of them.
        """
        own, fp32 = (torch.finfo(dtype).eps / 2 for dtype in (result.dtype, torch.float32))
        inner = torch.finfo(self.inner_dtype).eps / 2
        return 4 * max(own, inner) + 4 * self.summed**0.5 * fp32

    def check(
        self, provider: Provider, results: Results, *, complete: bool = False
    ) -> tuple[float, float]:
        """Return the error that comes closest to what is allowed, and that; raise beyond it."""
        truth, allowed = self.judged(provider.computes)
        unlike = results.keys() != truth.keys() if complete else results.keys() - truth.keys()
        if not results or unlike:
            raise WrongError(f"returned {sorted(results)}, not {sorted(truth)}")
        found = []
        for name, got in self.sampled(results).items():
            limit = allowed[name] + self.rounding(got) + provider.more_error
            error = error_of(got, truth[name])
            if not error <= limit or not bool(results[name].isfinite().all()):
                raise WrongError(f"{name} is off by {error:.1e} of its norm, allowed {limit:.1e}")
            found.append((error, limit))
        return max(found, key=lambda pair: pair[0] / pair[1])


def error_of(got: Tensor, truth: Tensor) -> float:
    """‖got - truth‖ / ‖truth‖, NaN where there is one."""
    if got.shape != truth.shape:
        raise WrongError(f"shape {tuple(got.shape)}, not {tuple(truth.shape)}")
    return float((got.double() - truth).norm() / truth.norm())


def spread_rows(tokens: int) -> Tensor:
    """The rows that are compared, the first and the last among them."""
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=DEVICE).long().unique()


def needs_triton(*, interpreted: bool = True) -> None:
    """Raise where Triton kernels do not run; the interpreter counts if it can have them right."""
    if not (GPU or (INTERPRETED and interpreted)):
        raise AbsentError("needs a GPU")


def measured(case: Case, name: str, benchmark: Any = None) -> Row:
    """Check a provider of a case and time it beside the floor; return the row.

    With pytest-benchmark's fixture that has the clock, and prints its own table; else events on the
    device do. A provider that cannot run, is wrong or takes more memory than there is becomes a row
    that says so.
    """
    provider = case.PROVIDERS[name]
    identity = {**case.spec.identity, "provider": name, "computes": provider.computes}
    try:
        call = provider.make(case)
        case.refill()
        error, allowed = case.check(provider, call(), complete=name.startswith("ours"))
        case.refill()
        peak = peak_bytes(call)
        case.floor()
        rounds = rounds_for(call, case.ready, BUDGET_S, LEAST_ROUNDS, case.most_rounds)
        clock = alternated_ms if benchmark is None else by_fixture(benchmark)
        times_ms, floors_ms = clock(call, case.floor, case.ready, rounds)
    except AbsentError as reason:
        return {**identity, "skipped": str(reason)}
    except WrongError as reason:
        return {**identity, "failed": f"wrong: {reason}"}
    except torch.OutOfMemoryError:
        return {**identity, "failed": OUT_OF_MEMORY}
    except Exception as error:  # a peer's, whose versions are many
        return {
            **identity,
            "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        }
    return row(
        identity, times_ms, floors_ms, floor=case.floor_name, bytes_moved=case.bytes_moved,
        flops=case.flops, peak_bytes=peak, error=error, error_allowed=allowed,
    )  # fmt: skip


def by_fixture(benchmark: Any) -> Callable[..., tuple[list[float], list[float]]]:
    """alternated_ms with the fixture's clock: its setup of each round has the floor's time."""

    def alternated(
        call: Callable[[], object],
        floor: Callable[[], object],
        ready: Callable[[], object],
        rounds: int,
    ) -> tuple[list[float], list[float]]:
        floors_ms = []

        def setup() -> None:
            ready()
            begin = clock_s()
            floor()
            floors_ms.append(1e3 * (clock_s() - begin))
            ready()
            synchronize()

        def finished() -> None:
            call()
            synchronize()

        benchmark.pedantic(finished, setup=setup, rounds=rounds)
        return [1e3 * seconds for seconds in benchmark.stats.stats.data], floors_ms

    return alternated
