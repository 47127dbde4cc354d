"""What every suite shares: a case with its floor, and providers of its result, checked then timed.

A provider's result is compared with fp64, by the norm: its error may be twice that of plain torch
in the same dtype plus what its own dtype explains (`rounding`). A wrong result is not timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from meter import DEVICE, GPU, Call, Evictor, alternated_ms, clock_s, peak_bytes, rounds_for
from records import Row, row
from shapes import DTYPES, Spec
from torch import Tensor

from hfprune_fast.kernels import CPP_INSTRUCTIONS
from hfprune_fast.kernels._triton import INTERPRETED

Results = dict[str, Tensor]
# Rows whose gradients are compared, spread over all: each is computed alone.
CHECKED_ROWS = 64
# The least number of rounds of each provider, and about how many seconds of calls.
LEAST_ROUNDS, BUDGET_S = 3, 0.5
OUT_OF_MEMORY = "out of memory"


class AbsentError(Exception):
    """A provider cannot run here; the reason in a line."""


class WrongError(Exception):
    """A provider's result is not the operation's."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation's result, in a call that returns all or some of it."""

    make: Callable[[Any], Callable[[], Results]]
    computes: str = ""  # if not what the case computes
    more_error: float = 0.0  # allowed beside rounding, for a provider that documents it


class Case(ABC):
    """An operation's inputs at one shape, and what results and times are compared with."""

    PROVIDERS: ClassVar[dict[str, Provider]]
    EAGER: ClassVar[dict[str, Callable[..., Any]]]  # plain torch, for what each computes
    letters: ClassVar[str]  # of the sizes T, D, F and V
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    small: ClassVar[tuple[str, ...]] = ("Llama-2-7B", "Llama-3.1-8B")  # whose shapes a CPU takes
    small_tokens: ClassVar[int] = 0
    computes: ClassVar[str] = "entropy"
    floor_name: ClassVar[str] = "copy"
    bytes_moved: int = 0  # by any provider that reads its input once and writes its output once
    flops: int = 0
    most_rounds: int = 50
    on_gpu: bool = GPU
    summed: int = 1  # terms of a result's largest sum
    inner_dtype: torch.dtype = torch.float64  # of a coarser intermediate that every provider has

    def __init__(self, spec: Spec) -> None:
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.evict = Evictor()
        self._judged: dict[str, tuple[Results, dict[str, float]]] = {}

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        made = torch.empty(shape, dtype=self.dtype, device=DEVICE)
        return made.normal_(std=std, generator=self.generator)

    def integers(self, count: int, below: int) -> Tensor:
        return torch.randint(below, (count,), device=DEVICE, generator=self.generator)

    def refill(self) -> None:  # noqa: B027 - most providers leave their input as it was
        """Restore what a call overwrote."""

    def ready(self) -> None:
        """Before each call, outside its time: fresh inputs, cold caches."""
        self.refill()
        self.evict()

    def floor(self) -> None:
        """Copy as many bytes; cases of matrix products have their own floor."""
        self._copied[1].copy_(self._copied[0])

    @cached_property
    def _copied(self) -> tuple[Tensor, Tensor]:
        source = torch.rand(self.bytes_moved // 8, device=DEVICE)  # zeros may be compressed
        return source, torch.empty_like(source)

    @abstractmethod
    def truth(self, computes: str) -> Results:
        """Return the result in fp64, written plainly; of per-row results those of `spread_rows`."""

    @abstractmethod
    def run(self, function: Callable[..., Any]) -> Results:
        """Return what a function of EAGER, or a peer like it, makes of the inputs."""

    def sampled(self, results: Results) -> Results:
        """Return the part of a provider's results that the truth has."""
        return results

    def rounding(self, result: Tensor) -> float:
        """Return what a result's own dtype explains: four roundings, and those of an fp32 sum of n
        terms one after the other, which are of either sign: √n of them.
        """
        own, inner = (torch.finfo(dtype).eps / 2 for dtype in (result.dtype, self.inner_dtype))
        return 4 * max(own, inner) + 2 * self.summed**0.5 * torch.finfo(torch.float32).eps

    def check(
        self, provider: Provider, results: Results, *, complete: bool = False
    ) -> tuple[float, float]:
        """Return the error closest to what is allowed, and that; raise WrongError beyond it."""
        computes = provider.computes or self.computes
        if computes not in self._judged:  # the truth, and twice the error of plain torch
            truth, plain = self.truth(computes), self.sampled(self.run(self.EAGER[computes]))
            allowed = {name: 2 * error_of(plain[name], truth[name]) for name in truth}
            self._judged[computes] = truth, allowed
        truth, allowed = self._judged[computes]
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
    """Return ‖got - truth‖ / ‖truth‖, NaN where there is one."""
    if got.shape != truth.shape:
        raise WrongError(f"shape {tuple(got.shape)}, not {tuple(truth.shape)}")
    return float((got.double() - truth).norm() / truth.norm())


def spread_rows(tokens: int) -> Tensor:
    """Return the indices of the compared rows, the first and the last among them."""
    return torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=DEVICE).long().unique()


def needs_triton(*, interpreted: bool = True) -> None:
    """Raise AbsentError where Triton kernels do not run; the interpreter counts if it is exact."""
    if not (GPU or (INTERPRETED and interpreted)):
        raise AbsentError("needs a GPU")


def needs_cpp() -> None:
    """Raise AbsentError where the C++ kernels do not run."""
    if GPU or not CPP_INSTRUCTIONS:
        raise AbsentError("needs a CPU" if GPU else "the C++ extension is not in use")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()  # or it would give up on compiling after some shapes
    return torch.compile(function, dynamic=False)


def by(function: Callable[[Any], Results]) -> Provider:
    return Provider(lambda case: partial(function, case))


def ours(function: Callable[[Any, str], Results], backend: str) -> Provider:
    def make(case: Any) -> Callable[[], Results]:
        if backend == "triton":
            needs_triton()
        if backend == "cpp":
            needs_cpp()
        return lambda: function(case, backend)

    return Provider(make)


def providers(
    own: Callable[[Any, str], Results], eager: Callable[..., Any], reference: Any
) -> dict[str, Provider]:
    """Return the usual providers: own(case, backend), and others by `case.run(function)`."""
    return {
        "ours, torch": ours(own, "torch"),
        "ours, cpp": ours(own, "cpp"),
        "ours, triton": ours(own, "triton"),
        **({"HFPrune's arithmetic": by(lambda case: case.run(reference))} if reference else {}),
        "eager": by(lambda case: case.run(eager)),
        "torch.compile": Provider(lambda case: partial(case.run, compiled(eager))),
    }


def measured(case: Case, name: str, benchmark: Any = None) -> Row:
    """Check a provider of a case, time it beside the floor, and return the row.

    With pytest-benchmark's fixture that has the clock, and prints its own table; else events on the
    device do. A provider that cannot run, is wrong or runs out of memory has a row that says so.
    """
    provider = case.PROVIDERS[name]
    computes = provider.computes or case.computes
    identity = {**vars(case.spec), "provider": name, "computes": computes}
    try:
        call = provider.make(case)
        case.refill()
        error, allowed = case.check(provider, call(), complete=name.startswith("ours"))
        case.refill()
        peak = peak_bytes(call)
        case.floor()
        rounds = 1  # a rehearsal's times mean nothing
        if not INTERPRETED:
            rounds = rounds_for(call, case.ready, BUDGET_S, LEAST_ROUNDS, case.most_rounds)
        clock = partial(alternated_ms, on_gpu=case.on_gpu)
        if benchmark is not None:
            clock = partial(by_fixture, benchmark)
        times_ms, floors_ms = clock(call, case.floor, case.ready, rounds)
    except AbsentError as reason:
        return {**identity, "skipped": str(reason)}
    except Exception as error:  # a peer's, whose versions are many
        return {**identity, "failed": failure_text(error)}
    return row(
        identity, times_ms, floors_ms, floor=case.floor_name, bytes_moved=case.bytes_moved,
        flops=case.flops, peak_bytes=peak, error=error, error_allowed=allowed,
    )  # fmt: skip


def failure_text(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    kind = "wrong" if isinstance(error, WrongError) else type(error).__name__
    return f"{kind}: {' '.join(str(error).split())[:300]}"


def by_fixture(
    benchmark: Any, call: Call, floor: Call, ready: Call, rounds: int
) -> tuple[list[float], list[float]]:
    """Do as alternated_ms by the fixture's clock: the setup of each round times the floor."""
    floors_ms = []

    def setup() -> None:
        ready()
        begin = clock_s()
        floor()
        floors_ms.append(1e3 * (clock_s() - begin))
        ready()
        clock_s()

    benchmark.pedantic(lambda: (call(), clock_s()), setup=setup, rounds=rounds)
    return [1e3 * seconds for seconds in benchmark.stats.stats.data], floors_ms
