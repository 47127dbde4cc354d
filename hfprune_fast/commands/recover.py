"""hfprune recover: `hf.recover` with progress bars, and the summary printed at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfprune_fast.recovery.run import recover


def run(dense: str, pruned: str, text_source: str, out: Path, **options: Any) -> dict[str, Any]:
    """Train a pruned model; empty in the processes of torchrun but the first."""
    return recover(dense, pruned, text_source, out, distributed=True, progress=True, **options)


def text(result: dict[str, Any], dense: str) -> str:
    """Return what `run` did as human-readable text."""
    before, after = result["kl_before"], result["kl_after"]
    change = f"{abs(1 - after / before):.1%} {'less' if after < before else 'more'}"
    what = (
        f"held-out KL {before:.4f} -> {after:.4f} nats ({change}), best after "
        f"step {result['best_step']} of {result['steps']}, {result['tokens']:,} tokens"
        if result["best_step"]
        else f"the pruned model as it was, held-out KL {before:.4f} nats: no step was better"
    )
    return f"{result['out']}: {what}\nnext: {_next(result, dense)}"


def _next(result: dict[str, Any], dense: str) -> str:
    if result["adapter"]:
        return f"peft.PeftModel.from_pretrained(the pruned model, {str(result['out'])!r})"
    return f"hfprune evaluate {dense} {result['out']} --text SOURCE"
