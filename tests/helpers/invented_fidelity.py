"""Rows of fidelity.py for the tables that are made of them; the numbers are made up."""

import json
from pathlib import Path
from typing import Any

from fidelity_variants import DEFAULT, PAPER, RANDOM, UNIFORM, Variant

KL = {
    PAPER: {0.2: (0.10, 0.12, 0.20), 0.5: (1.0, 1.1, 1.2)},
    RANDOM: {0.2: (0.3, 0.3, 0.3), 0.5: (3.0, 3.3, 3.6)},
    UNIFORM: {0.2: (0.05, 0.03, 0.04), 0.5: (0.25, 0.55, 0.6)},
    DEFAULT: {0.2: (0.02, 0.024, 0.04), 0.5: (0.2, 0.22, 0.24)},
}


def invented_header(name: str, model_type: str, params: int) -> dict[str, Any]:
    return {
        "model": name, "model_type": model_type, "params": params,
        "calibration": {"samples": 8, "seq_len": 64}, "evaluation": {"samples": 4, "seq_len": 64},
        "texts": ["one.txt", "other.txt"], "date": "2030-01-02T15:00:00+00:00",
        "machine": {"name": "inventa-9", "device": "cpu", "processor": "Inventa 9", "cores": 2},
        "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "uncommitted_changes": False,
    }  # fmt: skip


def invented(
    name: str, kl: dict[Variant, dict[float, tuple[float, ...]]], params: int = 1_000_000
) -> list[dict[str, Any]]:
    header = invented_header(name, "llama", params)
    rows = [
        {
            **vars(variant), "prune_ratio": ratio, "seed": seed, "widths": [10, 12],
            "param_ratio": ratio / 2, "kl_nats": value, "ppl_dense": 30.0,
            "ppl_pruned": 30 + value, "top1_agreement": 1 - value / 10, "tokens": 256,
        }
        for variant, of in kl.items()
        for ratio, values in of.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    return [header, *rows]


def write(path: Path, told: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in told), encoding="utf-8")
