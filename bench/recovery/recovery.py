"""How close pruning, reconstruction and recovery bring a model to the dense one, at what cost.

    python bench/recovery/recovery.py --name demo --model demo --text demo \\
        --held-out hfprune_fast/tiny/heldout.txt --seq-len 256

Rows go to bench/results/recovery/<name>.jsonl. A model is pruned by the default recipe, again with
`--refit reconstruct`, and the first of these is recovered by KL and by cross entropy, with the same
tokens. All are measured on a text that no step saw; with --tasks N by zero-shot tasks too,
which are made of that text (`local_tasks.py`). Each step is a command of its own in one thread,
whose processor time and memory are in its row, so that other work on the machine counts little.
Rows come as they are measured, and an interrupted run goes on where it was; --work DIR keeps its
models, so that an interrupted recovery goes on too. With other settings both are refused. The table
and the picture are of all rows: python bench/reporting/report.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # not there with PYTHONSAFEPATH
from local_tasks import NAMES, write_tasks

from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions, RunOptions
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.evaluation.checkpoints import compare_checkpoints
from hfprune_fast.evaluation.harness import evaluate_tasks

RESULTS = Path(__file__).parents[1] / "results" / "recovery"
ON_CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
RATIOS, TOKENS = (0.2, 0.5), (100_000, 500_000)
WAYS = ("pruned", "reconstructed", "kl", "ce")
OF_MODELS = ("model", "text", "seq_len", "samples")  # that are kept, rows are of all of these
SETTINGS = (*OF_MODELS, "held_out", "held_out_samples", "tasks")
Way = tuple[str, int]  # pruned, reconstructed, kl or ce, and the tokens trained on


@dataclass
class Job:
    """A model at one ratio, its texts and the folder that its steps write to."""

    arguments: argparse.Namespace
    ratio: float
    work: Path

    def made(self, way: Way) -> tuple[Path, dict[str, Any]]:
        """Return the folder that a way leads to, made if it is not there, and facts for its row."""
        name, tokens = way
        out = self.work / f"{name}-{tokens}-{self.ratio}"
        facts = Path(f"{out}.json")
        if not facts.exists():
            found = self._recovered(way, out) if tokens else self._pruned(name, out)
            facts.write_text(json.dumps(found), encoding="utf-8")
        return out, json.loads(facts.read_text(encoding="utf-8"))

    def _pruned(self, name: str, out: Path) -> dict[str, Any]:
        given = self.arguments
        prune = ["prune", given.model, "--calibration", given.text, "--samples", given.samples]
        prune += ["--prune-ratio", self.ratio, "--out", out, "--force"]
        refit = ["--refit", "reconstruct"] if name == "reconstructed" else []
        return self._run(*prune, *refit)[1]

    def _recovered(self, way: Way, out: Path) -> dict[str, Any]:
        given, (loss, tokens) = self.arguments, way
        pruned, _ = self.made(("pruned", 0))
        recover = ["recover", given.model, pruned, "--text", given.text, "--out", out]
        recover += ["--loss", loss, "--tokens", tokens, "--cache", self.work / f"states-{tokens}"]
        begun = Path(f"{out}.recovery").exists()
        result, cost = self._run(*recover, "--resume" if begun else "--force")
        return {
            **({} if begun else cost),  # of a run that was continued, that of its last part
            **{key: result[key] for key in ("learning_rate", "lora", "best_step", "steps")},
            "kl_at_start": result["kl_before"],
            "kl_at_checks": [round(kl, 5) for _, kl in result["held_out"]],
        }

    def _run(self, *command: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a command of hfprune; return what it printed, and its processor time and memory."""
        common = ["--seq-len", self.arguments.seq_len, "--json"]
        common += [part for key, value in ON_CPU.items() for part in (f"--{key}", value)]
        words = [sys.executable, "-m", "hfprune_fast", *map(str, [*command, *common])]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, cwd=self.work, stdout=subprocess.PIPE, env=alone)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if code := os.waitstatus_to_exitcode(status):
            raise SystemExit(f"exit code {code} of {' '.join(words)}")
        cpu_seconds, peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        cost = {"cpu_seconds": round(cpu_seconds, 1), "peak_bytes": peak_bytes}
        return json.loads(said), cost

    def measured(self, folder: Path) -> dict[str, Any]:
        """Return KL, perplexities, agreement and the tasks' values on the held-out text."""
        given = self.arguments
        dense, other = open_source(given.model), open_source(folder)
        data = held_out(given, dense)
        found = asdict(compare_checkpoints(dense, other, data, RunOptions(**ON_CPU)))
        row = {"held_out_tokens": found.pop("tokens"), **found}
        if given.tasks:
            tasks = self.work / "tasks"
            which: dict[str, Any] = {"tasks": ",".join(NAMES), "include_path": str(tasks)}
            row["tasks"] = [asdict(t) for t in evaluate_tasks(dense, other, **which, **ON_CPU)]
        return row


def held_out(given: argparse.Namespace, dense: ModelSource) -> TokenData:
    """Return what is measured on."""
    sampling = CalibrationOptions(given.held_out_samples, given.seq_len)
    return calibrate(given.held_out, dense, sampling, evaluation=True)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """Return what all rows of a file have in common; of models and texts, the names."""
    own = {name: getattr(given, name) for name in SETTINGS}
    return own | {name: Path(own[name]).name for name in ("model", "text", "held_out")}


def check(given: argparse.Namespace, out: Path, work: Path) -> None:
    """Refuse results and models of other settings, and a text to measure on, before any work."""
    file = work / "settings.json"
    of_models = {name: getattr(given, name) for name in OF_MODELS}
    kept = []
    if file.exists():
        kept = [(work, json.loads(file.read_text(encoding="utf-8")), of_models)]
    rows = [(out, row["settings"], settings(given)) for row in read(out) if "settings" in row]
    for place, found, own in kept + rows:
        for name, value in own.items():
            if found[name] != value:
                told = f"{place} is of --{name.replace('_', '-')} {found[name]}, not {value}"
                raise SystemExit(f"recovery.py: {told}; give another --name and --work")
    held_out(given, open_source(given.model))
    if given.tasks:
        text = Path(given.held_out).read_text(encoding="utf-8")
        write_tasks(text, work / "tasks", given.tasks)
    file.write_text(json.dumps(of_models), encoding="utf-8")


def run(job: Job, ways: list[Way], out: Path) -> None:
    """Add a row for each way that has none."""
    there = {(row["ratio"], row["way"], row["tokens"]) for row in read(out)}
    for way in ways:
        if (job.ratio, *way) not in there:
            folder, facts = job.made(way)
            row = {
                "name": job.arguments.name, "ratio": job.ratio, "way": way[0], "tokens": way[1],
                **facts, **job.measured(folder), "settings": settings(job.arguments),
            }  # fmt: skip
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("name", "model", "text", "held-out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64, help="of the calibration")
    parser.add_argument("--held-out-samples", type=int, help="windows [default: the whole text]")
    parser.add_argument("--ratio", type=float, action="append", help="[default: 0.2 and 0.5]")
    parser.add_argument("--tokens", type=int, action="append", help="[default: 100000 and 500000]")
    parser.add_argument("--way", action="append", choices=WAYS, help="[default: all]")
    parser.add_argument("--tasks", type=int, default=0, metavar="N", help="documents of each")
    parser.add_argument("--work", type=Path, help="keep models here [default: deleted]")
    arguments = parser.parse_args()
    for name in ("model", "text", "held_out"):  # commands run elsewhere
        if (path := Path(getattr(arguments, name))).exists():
            setattr(arguments, name, str(path.resolve()))
    ways = arguments.way or WAYS
    each = [(way, 0) for way in ways if way in ("pruned", "reconstructed")]
    each += [(w, n) for n in arguments.tokens or TOKENS for w in ways if w in ("kl", "ce")]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        out = RESULTS / f"{arguments.name}.jsonl"
        check(arguments, out, work)
        for ratio in arguments.ratio or RATIOS:
            run(Job(arguments, ratio, work), each, out)


if __name__ == "__main__":
    main()
