"""hfprune recover: `hf.recover` with progress bars, and the summary printed at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfprune_fast.recovery.run import recover


def run(dense: str, pruned: str, text_source: str, out: Path, **options: Any) -> dict[str, Any]:
    """Train a pruned model; empty in the processes of torchrun but the first."""
    return recover(dense, pruned, text_source, out, distributed=True, progress=True, **options)


def text(result: dict[str, Any], dense: str) -> str:
    """Return what `run` did as people read it."""
    before, after = result["kl_before"], result["kl_after"]
    return (
        f"{result['out']}: held-out KL {before:.4f} -> {after:.4f} nats "
        f"({1 - after / before if before else 0:.1%} less), best after step {result['best_step']} "
        f"of {result['steps']}, {result['tokens']:,} tokens\n"
        f"next: hfprune evaluate {dense} {result['out']} --text SOURCE"
    )
