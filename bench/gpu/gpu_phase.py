"""What the phases of `gpu_check.py` share: progress, the yardstick, and checked scores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from case import failure_text
from meter import DEVICE, GPU, ceilings, clock_s
from models import Shape
from records import Row
from torch import Tensor

from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.plan import Plan
from hfprune_fast.scoring import run
from hfprune_fast.scoring.sums import PassOptions

BF16 = torch.bfloat16
U = torch.finfo(BF16).eps / 2  # the most that one rounding changes, relatively
SEQ_LEN = 1024 if GPU else 32
LLAMA_8B = "Llama-3.1-8B" if GPU else ""  # a rehearsal's shapes are nobody's


class Phase:
    """What a phase has found so far; its JSON file is kept up to date."""

    def __init__(self, out: Path | str, limit_s: float | str) -> None:
        self.out, self._begun = Path(out), time.monotonic()
        self.deadline = self._begun + float(limit_s)  # nothing new is started after it
        self.rows: list[Row] = []
        self.result: dict[str, Any] = {"rows": self.rows, "skipped": [], "errors": []}
        torch.manual_seed(0)
        if not GPU:
            torch.set_num_threads(1)  # which serves a rehearsal's sizes best

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def note(self, what: str) -> None:
        print(f"{time.monotonic() - self._begun:6.1f} s  {what}", flush=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.result))
        part.replace(self.out)

    def skip(self, what: str) -> None:
        self.result["skipped"].append(what)
        self.note(what)

    def failed(self, what: str, error: Exception) -> None:
        """Keep an error and go on."""
        self.result["errors"].append(f"{what}: {failure_text(error)}")
        self.note(self.result["errors"][-1])
        if GPU:
            torch.cuda.empty_cache()


def products_per_s() -> float:
    """Return the yardstick, at this moment: the FLOP/s of large bf16 products."""
    (found,) = ceilings("full" if GPU else "tiny", ("bfloat16",))
    return 1e9 * float(found["product_gflop_per_s"])


def milliseconds(call: Callable[[], object]) -> float:
    """Time one call by the host's clock, until the device has finished."""
    begin = clock_s()
    call()
    return 1e3 * (clock_s() - begin)


def identity(op: str, shape: Shape, tokens: int, provider: str, model: str = "") -> Row:
    """Return what identifies a row of a bf16 model or layer."""
    return {
        "op": op, "model": model, "dtype": "bfloat16", "sizes": {"T": tokens, **shape.sizes},
        "provider": provider, "computes": "entropy" if op == "score" else op,
    }  # fmt: skip


def verdict(missed: dict[str, bool]) -> str:
    """Return "pass", or which of these were missed."""
    return "; ".join(text for text, yes in missed.items() if yes) or "pass"


def l1_scores(model: ResidentModel, ids: Tensor, plan: Plan, **how: Any) -> Tensor:
    """Score an entered model as planned; return l1 (L, F).

    Out of memory is an error here, where otherwise another variant would be timed unseen.
    """
    options = PassOptions(
        backend=run.backend_for(torch.empty(0, dtype=BF16, device=DEVICE), None, False),
        logits_budget_bytes=plan.logits_budget_bytes,
        **{"recompute": plan.recompute, **how},
    )

    def refuse(message: str) -> None:
        raise RuntimeError(f"not what was requested: {message}")

    batches = micro_batch(ids, model.vocab).split(plan.batch_size)
    with mock.patch.object(run, "say", refuse):
        return run.score_batches(model, batches, options).statistics[0, 0]
