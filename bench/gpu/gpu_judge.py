"""Whether scores are right, and whether a provider did what it was asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hfprune_fast import scoring

U = torch.finfo(torch.bfloat16).eps / 2  # the most that one rounding changes, relatively


class Judge:
    """Holds every provider's l1 to fp32, by what plain torch loses in bf16.

    Ours may be off by twice as much and one rounding, as in the tests. The reference also rounds
    each product, each sum over the tokens and each sequence's total: so many roundings more.
    """

    def __init__(self, truth: Tensor, plain: Tensor) -> None:
        self.truth, self.plain_error = truth, relative_errors(plain, truth)

    def check(self, name: str, l1: Tensor, more_roundings: int = 0) -> dict[str, Any]:
        allowed = 2 * self.plain_error + (1 + more_roundings) * U
        return check_rows(name, relative_errors(l1, self.truth), allowed)


def check_rows(name: str, error: Tensor, allowed: Tensor) -> dict[str, Any]:
    """Return the error that comes closest to what is allowed; raise where one is beyond."""
    worst = int((error / allowed).nan_to_num(nan=torch.inf).argmax())
    if not bool((error <= allowed).all()):  # so NaN is refused, too
        raise ValueError(
            f"{name}: the l1 of layer {worst} is off by {float(error[worst]):.1e} of its norm; "
            f"{float(allowed[worst]):.1e} would be rounding"
        )
    return {"error": float(error[worst]), "error_allowed": float(allowed[worst])}


def relative_errors(got: Tensor, want: Tensor) -> Tensor:
    """‖got - want‖ / ‖want‖ of each layer, (L,) fp64 on the CPU; NaN where there is one."""
    got, want = got.double().cpu(), want.double().cpu()
    return (got - want).norm(dim=1) / want.norm(dim=1)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of the layer where it is least."""
    a, b = (t.double().cpu().argsort(dim=1).argsort(dim=1).double() for t in (one, other))
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return float(((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))).min())


@contextmanager
def no_retreat() -> Iterator[None]:
    """Out of memory is an error inside, where otherwise another way would be timed unseen."""

    def refuse(message: str) -> None:
        raise RuntimeError(f"not what was asked for: {message}")

    with mock.patch.object(scoring, "say", refuse):
        yield
