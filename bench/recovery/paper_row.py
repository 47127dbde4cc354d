"""A row of the paper's table: prune as HFPrune does, fine-tune, and answer zero-shot tasks.

    python bench/recovery/paper_row.py meta-llama/Llama-2-7b-hf --calibration CALIBRATION \\
        --text lamini.jsonl --tokens 400000000 --out row

The commands are printed before they run: `hfprune prune --preset paper`, `recover --loss ce` with
the paper's settings for LoRA, and `evaluate --tasks` of both results. What is in --out already is
not made again, and an interrupted recovery goes on; with other settings --out is refused.
docs/reproduce.md says what to expect.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

# Of the reference's scripts: LoRA of rank 32, alpha twice that, over packed windows.
FINE_TUNING = {"loss": "ce", "lora": 32, "learning-rate": 4e-4}
STEP_TOKENS = 32 * 1024  # its batches are summed over 32 windows
METRICS = ("acc_norm", "acc")  # the first of them that a task has


def run(*words: Any) -> dict[str, Any]:
    """Run a command of hfprune and return what it says."""
    command = [*map(str, words), "--json"]
    print("$ hfprune", shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "hfprune_fast", *command], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def made(out: Path, *words: Any) -> Path:
    """Return a folder, made by a command unless it is there."""
    if not out.exists():
        resume = ["--resume"] if Path(f"{out}.recovery").exists() else []
        run(*words, "--out", out, *resume)
    return out


def answered(file: Path, *words: Any) -> list[dict[str, Any]]:
    """Return what the tasks gave, from a file if it is there."""
    if not file.exists():
        partial = file.with_suffix(".new")
        partial.write_text(json.dumps(run(*words)["tasks"], indent=1), encoding="utf-8")
        os.replace(partial, file)
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def accuracies(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return {task: {"dense", "pruned"}}, of the metric that the paper averages."""
    found: dict[str, dict[str, float]] = {}
    for metric in reversed(METRICS):
        for row in rows:
            if row["metric"].split(",")[0] == metric:
                found[row["task"]] = {which: row[which] for which in ("dense", "pruned")}
    return found


def table(pruned: list[dict[str, Any]], tuned: list[dict[str, Any]]) -> str:
    """Return accuracies in percent, a line a task and their mean."""
    first, second = accuracies(pruned), accuracies(tuned)
    if not first:
        raise SystemExit("no task has an accuracy, so there is no table")
    lines = [
        [name, first[name]["dense"], first[name]["pruned"], second[name]["pruned"]]
        for name in first
    ]
    means = [sum(line[i] for line in lines) / len(lines) for i in (1, 2, 3)]
    head = "| task | dense | pruned | fine-tuned |\n|---|---:|---:|---:|\n"
    return head + "".join(
        f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |\n"
        for name, *values in [*lines, ["mean", *means]]
    )


def check_settings(given: argparse.Namespace) -> None:
    """Refuse a folder with results of other settings."""
    file = given.out / "settings.json"
    own = {name: str(value) for name, value in vars(given).items() if name != "out"}
    if not file.exists():
        file.write_text(json.dumps(own, indent=1), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    for name in own:
        if found.get(name) != own[name]:
            option = f"--{name.replace('_', '-')}"
            told = f"{given.out} is of {option} {found.get(name)}, not {own[name]}"
            raise SystemExit(f"paper_row.py: {told}; give another --out")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder or a hub name")
    parser.add_argument("--calibration", required=True, help="text to score on")
    parser.add_argument("--text", required=True, help="text to fine-tune on")
    parser.add_argument("--text-field", help="of its records")
    parser.add_argument("--tokens", type=int, required=True, help="to fine-tune on")
    parser.add_argument("--out", type=Path, required=True, help="a folder for all results")
    parser.add_argument("--param-ratio", type=float, default=0.2, help="of all parameters")
    parser.add_argument("--samples", type=int, default=1024, help="of the calibration")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--batch-tokens", type=int, default=STEP_TOKENS, help="of a step")
    parser.add_argument("--tasks", default="paper")
    parser.add_argument("--include-path", type=Path, help="task files of your own")
    parser.add_argument("--limit", type=int, help="documents of each task")
    return parser.parse_args()


def main() -> None:
    given = parsed()
    given.out.mkdir(parents=True, exist_ok=True)
    check_settings(given)
    pruned = made(
        given.out / "pruned",
        "prune", given.model, "--preset", "paper", "--param-ratio", given.param_ratio,
        "--round-to", 1, "--calibration", given.calibration, "--samples", given.samples,
        "--seq-len", given.seq_len,
    )  # fmt: skip
    field = ["--text-field", given.text_field] if given.text_field else []
    settings = [word for key, value in FINE_TUNING.items() for word in (f"--{key}", value)]
    tuned = made(
        given.out / "tuned",
        "recover", given.model, pruned, "--text", given.text, *field, "--tokens", given.tokens,
        "--seq-len", given.seq_len, "--batch-tokens", given.batch_tokens, *settings,
    )  # fmt: skip
    tasks = ["--tasks", given.tasks]
    tasks += ["--include-path", given.include_path] if given.include_path else []
    tasks += ["--limit", given.limit] if given.limit else []
    rows = [
        answered(given.out / f"{each.name}-tasks.json", "evaluate", given.model, each, *tasks)
        for each in (pruned, tuned)
    ]
    print(table(*rows), end="")


if __name__ == "__main__":
    main()
