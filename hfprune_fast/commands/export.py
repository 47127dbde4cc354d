"""hfprune export: a pruned checkpoint in another form, for where models are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfprune_fast.models.size_text import widths_text
from hfprune_fast.pruning.export import export

_NEXT = {
    "custom": "loads with transformers after `import hfprune_fast`, or with trust_remote_code=True",
    "padded": "loads wherever its family does",
    "decilm": "vllm serve {out} --trust-remote-code",
    "gguf": "llama-cli -m {out}; llama-quantize {out} OUT.gguf Q4_K_M",
}


def run(
    model: str | Path, *, to: str, out: Path, converter: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Write a pruned model in another form."""
    return export(model, to, out, converter=converter, force=force)


def text(result: dict[str, Any]) -> str:
    """Return what `run` did as human-readable text."""
    widths = widths_text(result["mlp_widths"])
    return f"{result['out']}: MLP neurons a layer {widths}\n" + _NEXT[result["to"]].format(**result)
