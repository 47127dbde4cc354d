"""Record what the `hfprune` command line gives, and compare two records: a net under refactoring.

    python tools/golden.py --out before.json demo path/to/model:path/to/text.txt
    python tools/golden.py --compare before.json after.json

Each case runs with public flags only, on one CPU thread and within a fixed memory budget, so that
the same code gives the same record: tensors and files as sha256, JSON documents as they are.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

# Mostly in float32, since many CPUs take twice as long or more in bfloat16.
DATA = "--device cpu --memory-budget 4GiB --seq-len 64 --samples 8 --dtype float32"
FITTED = f"--calibration {{text}} {DATA}"
SCORE = f"score {{model}} --out {{out}} {FITTED} --batch-size 2"
SEVERAL = f"{SCORE} --criterion fisher --criterion entropy --criterion cross_entropy --obs"
WRITE = "prune {model} --out {out}"
PRUNE = f"{WRITE} --prune-ratio 0.25 --round-to 1"
SHARDED = f"{PRUNE} --max-shard-size 1MB"
REUSE = f"{PRUNE} --scores {{score}}"


@dataclass(frozen=True)
class Case:
    """A command, in which {score} and the like are the outputs of earlier cases."""

    name: str
    command: str
    how: str = ""  # "interrupted" after the first pass and resumed, or "torchrun", 2 processes
    once: bool = False  # for the first model only: nothing in it depends on the family


CASES = (
    Case("score", SEVERAL),
    Case("score-disk", f"{SEVERAL} --offload disk"),
    Case("score-cpu", f"{SEVERAL} --offload cpu", once=True),
    Case("score-interrupted", f"{SEVERAL} --save-seconds 0", "interrupted", once=True),
    Case("score-torchrun", SEVERAL, "torchrun", once=True),
    Case("score-parity", f"{SCORE} --parity --dtype auto", once=True),
    Case("score-activation", f"{SCORE} --criterion activation --dtype auto", once=True),
    Case("default", f"{PRUNE} {FITTED}"),
    Case("default-disk", f"{PRUNE} {FITTED} --offload disk --dtype auto", once=True),
    Case("paper", f"{PRUNE} {FITTED} --preset paper"),
    Case("uniform", f"{REUSE} {FITTED} --allocation uniform", once=True),
    Case("scores", REUSE),
    Case("scores-calibrated", f"{REUSE} {FITTED}"),
    Case("padded", f"{REUSE} --allocation global --layout padded --criterion entropy --protect 0"),
    Case("custom", f"{REUSE} --allocation global --layout custom --statistic l2 --min-keep 0.6"),
    Case("magnitude", f"{WRITE} --criterion magnitude --param-ratio 0.1", once=True),
    Case("random", f"{SHARDED} --criterion random --seed 3 --round-to 8", once=True),
    Case("evaluate", f"evaluate {{model}} {{default}} --text {{text}} {DATA}"),
    Case("plan", f"plan {{model}} --prune-ratio 0.25 {DATA}"),
)
# Versions, the machine's speed, and the temporary folder of an output.
LEFT_OUT = {"versions", "hfprune_fast", "transformers_version", "seconds", "out"}
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 "


def cleaned(value: Any) -> Any:
    """Return a JSON value without what differs between runs, and with long lists as a hash."""
    if isinstance(value, dict):
        return {key: cleaned(inner) for key, inner in value.items() if key not in LEFT_OUT}
    if isinstance(value, list) and len(value) > 32 and all(type(item) is int for item in value):
        return f"{len(value)} numbers {sha256(json.dumps(value).encode()).hexdigest()}"
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def tensors_of(file: Path) -> dict[str, Any]:
    """Return the hash of each tensor of a safetensors file, and the metadata."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:start])
    found = header.pop("__metadata__", {})
    found = {k: cleaned(json.loads(text)) if text[0] == "{" else text for k, text in found.items()}
    for name, tensor in header.items():
        begin, end = (start + offset for offset in tensor["data_offsets"])
        found[name] = f"{tensor['dtype']} {tensor['shape']} {sha256(data[begin:end]).hexdigest()}"
    return found


def run(case: Case, names: dict[str, str], folder: Path) -> dict[str, Any]:
    """Run a case; return the JSON that was printed, and all that was written."""
    out = folder / case.name
    words = f"{TORCHRUN * (case.how == 'torchrun')}-m hfprune_fast {case.command} --json".split()
    command = [sys.executable, *(word.format(**names, out=out) for word in words)]
    if case.how == "interrupted":
        state = out.with_name(f"{out.name}.state")
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=folder) as started:
            while started.poll() is None and not state.exists():
                time.sleep(0.01)
            started.send_signal(signal.SIGINT)
        if started.returncode != 130 or not state.exists():
            raise RuntimeError(f"interrupted: exit {started.returncode}, not 130, or no state")
        command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-400:]}")
    record: dict[str, Any] = {"printed": cleaned(json.loads(done.stdout))}
    for path in [out, *sorted(out.rglob("*"))]:
        if path.suffix == ".safetensors" or (path == out and out.is_file()):
            record.setdefault("tensors", {}).update(tensors_of(path))
        if path.name in {"config.json", "hfprune.json"}:
            record[path.name] = cleaned(json.loads(path.read_bytes()))
        elif path != out and path.is_file():
            name = path.relative_to(out).as_posix()
            record.setdefault("files", {})[name] = sha256(path.read_bytes()).hexdigest()
    return record


def run_model(argument: str, first: bool, only: str) -> dict[str, Any]:
    """Run the cases on MODEL[:TEXT]; return their records by name, a failure's too."""
    model, _, text = argument.partition(":")
    paths = {"model": model, "text": text or "demo"}
    names = {key: str(Path(p).resolve()) if Path(p).exists() else p for key, p in paths.items()}
    records: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        for case in CASES:
            if (case.once and not first) or not fnmatch(case.name, only):
                continue
            begun, record = time.monotonic(), {}
            try:
                record = run(case, names, Path(scratch))
            except (OSError, ValueError, KeyError, RuntimeError, subprocess.SubprocessError) as e:
                record["failed"] = f"{type(e).__name__}: {e}".replace(scratch, "")
            names[case.name], records[case.name] = str(Path(scratch) / case.name), record
            told = record.get("failed", f"{time.monotonic() - begun:.1f} s")
            print(f"{Path(model).name}/{case.name}: {told}", file=sys.stderr, flush=True)
    return {f"{Path(model).name}/{name}": record for name, record in records.items()}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return a line for each part of two JSON documents that is not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in old | new}
        return [d for key, pair in pairs.items() for d in differences(*pair, f"{path}/{key}")]
    return [] if old == new else [f"{path[1:]}: {str(old)[:200]} -> {str(new)[:200]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="*", metavar="MODEL[:TEXT]", help="TEXT is by default demo")
    parser.add_argument("--out", type=Path, help="the record to write")
    parser.add_argument("--jobs", type=int, default=1, help="models at once")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of names of cases")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="of paths")
    args = parser.parse_args()
    if args.compare:
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in args.compare)
        lines = [
            line
            for line in differences(old, new)
            if not any(fnmatch(line.split(": ")[0], ignored) for ignored in args.ignore)
        ]
        print("\n".join(lines) or f"{len(new)} cases are the same")
        return 1 if lines else 0
    if args.out is None or not args.models:
        parser.error("give --out FILE and models, or --compare OLD NEW")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("HFPRUNE_BACKEND", None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else background jobs ignore it
    print(f"recording {importlib.util.find_spec('hfprune_fast')}", file=sys.stderr)
    with ThreadPoolExecutor(args.jobs) as pool:
        parts = pool.map(lambda m: run_model(m, m == args.models[0], args.only), args.models)
        records = {name: record for part in parts for name, record in part.items()}
    args.out.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if any("failed" in record for record in records.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
