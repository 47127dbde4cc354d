"""How much closer recovery brings a pruned model: rows of bench/results/recovery/<name>.jsonl.

    python bench/recovery/recovery.py --name demo --model demo --text demo \\
        --held-out hfprune_fast/tiny/heldout.txt --seq-len 256

Prunes a model by the default recipe, and recovers each by KL and by cross entropy, with the same
tokens. All are measured on the whole of a text that neither saw. Rows come as they are measured, an
interrupted run goes on where it was, and the table beside them is made of all rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hfprune_fast as hf
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions, RunOptions
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.evaluation.checkpoints import compare_checkpoints

RESULTS = Path(__file__).parents[1] / "results" / "recovery"
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
HEADER = """| model | removed | | tokens | KL, nats | perplexity | KL watched | minutes |
|---|---:|---|---:|---:|---:|---:|---:|"""


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return KL, perplexities and agreement on the held-out text."""
    dense = open_source(arguments.model)
    sampling = CalibrationOptions(None, arguments.seq_len)
    data = calibrate(arguments.held_out, dense, sampling, evaluation=True)
    found = asdict(compare_checkpoints(dense, open_source(folder), data, RunOptions(**ON_CPU)))
    return {"held_out_tokens": found.pop("tokens"), **found}


def run(
    arguments: argparse.Namespace, ratio: float, ways: list[tuple[str, int]], out: Path
) -> None:
    """Add a row for the pruned model, and one for each way to recover it, that are not there."""
    there = {(row["ratio"], row["loss"], row["tokens"]) for row in read(out)}
    remaining = [way for way in ways if (ratio, *way) not in there]
    if not remaining:
        return
    text: dict[str, Any] = {"seq_len": arguments.seq_len, **ON_CPU}
    with tempfile.TemporaryDirectory() as scratch:
        pruned, recovered = Path(scratch) / "pruned", Path(scratch) / "recovered"
        hf.oneshot(
            arguments.model, arguments.text, pruned, prune_ratio=ratio, samples=arguments.samples,
            **text,
        )  # fmt: skip
        for loss, tokens in remaining:
            begun, result = time.perf_counter(), dict[str, Any]()
            if tokens:
                cache = str(Path(scratch) / f"states-{tokens}")
                options = {"loss": loss, "tokens": tokens, "cache": cache, "force": True, **text}
                result = hf.recover(arguments.model, pruned, arguments.text, recovered, **options)
            row = {
                "name": arguments.name, "ratio": ratio, "loss": loss, "tokens": tokens,
                "seconds": round(time.perf_counter() - begun, 1),
                **{key: result.get(key) for key in ("learning_rate", "lora", "best_step")},
                "kl_at_start": result.get("kl_before"),
                "kl_at_checks": [round(kl, 5) for _, kl in result.get("held_out", [])],
                **measured(arguments, recovered if tokens else pruned),
            }  # fmt: skip
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return [json.loads(line) for line in lines]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    names = {"": "pruned", "kl": "by KL", "ce": "by cross entropy"}
    lines = [HEADER]
    for row in rows:
        ppl = f"{row['ppl_pruned']:.2f} (dense {row['ppl_dense']:.2f})"
        watched = taken = ""
        if row["tokens"]:
            watched = f"{row['kl_at_start']:.4f}, {row['kl_at_checks'][-1]:.4f}"
            taken = f"{row['seconds'] / 60:.1f}"
        lines.append(
            f"| {row['name']} | {row['ratio']:.0%} | {names.get(row['loss'], row['loss'])} | "
            f"{row['tokens']:,} | {row['kl_nats']:.4f} | {ppl} | {watched} | {taken} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("name", "model", "text", "held-out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64, help="of the calibration")
    parser.add_argument("--ratio", type=float, action="append", help="[default: 0.2 and 0.5]")
    parser.add_argument("--tokens", type=int, action="append", help="[default: 500000]")
    parser.add_argument("--loss", action="append", help="[default: kl and ce]")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    losses = arguments.loss or ["kl", "ce"]
    each = [(loss, n) for n in arguments.tokens or [500_000] for loss in losses]
    for ratio in arguments.ratio or [0.2, 0.5]:
        run(arguments, ratio, [("", 0), *each], RESULTS / f"{arguments.name}.jsonl")
    rows = [row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path)]
    (RESULTS / "recovery.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
