"""Check and time every kernel on the GPU at hand; no network, nothing to install.

    python bench/gpu/gpu_check.py --out bench/results                      under 8 minutes
    python bench/gpu/gpu_check.py --only correctness scoring --out bench/results
    python bench/gpu/gpu_check.py --only timing --limit timing=560 --out bench/results

It needs what a stock CUDA image has: torch, triton, transformers, pytest, pip and setuptools. It
builds the package into a temporary folder, compiles the kernels in as many processes as there are
cores, runs `tests/gpu`, and times each kernel beside its floor and its peers (liger-kernel and
cut-cross-entropy where they are installed). It writes DIR/<machine>-<date>-<phases>.json, in the
form that `report.py` makes tables of, and in the folder of that name with .check the verdicts on
targets (check.md) and a log of each phase. Each phase has a process and a time limit of its own
(`--limit`), so one that fails loses no other. `--only` names the phases to run after build and
compile:

    correctness  tests/gpu
    timing       the kernels' rows; those with no time left say so
    scoring      an 8B model scored, beside the paper's arithmetic; needs 70 GB of GPU memory
    refit        removal costs and a refit of one layer of an 8B's shape
    recipe       the default recipe on a 1B model from disk to disk, phase by phase
    commands     score, prune and recover as users run them, beside the same on the CPU
    tuning       kernels under other launch configurations
    streamed     a 70B's layers from disk and RAM; 25 GB of disk under TMPDIR, 45 GB of host memory

`--rehearse` runs on a CPU. `--commit` names the commit where there is no git.

The exit status is 0 when all ran and was correct, whatever the times; 1 when a phase or a test
failed; 2 when there is no CUDA device or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
import torch
from records import RESULTS, ROOT, Result, described, rounded, write
from report import markdown

# Seconds a phase may take; build, compile, correctness and timing are under 8 minutes together.
LIMITS_S = {
    "build": 90, "compile": 45, "correctness": 170, "timing": 165, "scoring": 150, "refit": 70,
    "recipe": 150, "commands": 150, "tuning": 200, "streamed": 235,
}  # fmt: skip
FIRST, DEFAULT = ("build", "compile"), ("correctness", "timing")
# Before the limit a process is asked to end, and a worker this long before that starts nothing new.
GRACE_S = 20
# The short ones that cover most come first.
TESTS = ("taylor", "entropy", "linear_entropy", "linear_kl", "operations", "norms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [name for name in LIMITS_S if name not in FIRST]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=choices, default=DEFAULT, metavar="PHASE")
    parser.add_argument("--limit", nargs="+", type=_limit, default=[], metavar="PHASE=S")
    parser.add_argument("--commit", metavar="HASH", help="of the sources, where there is no git")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.rehearse and out.is_relative_to(RESULTS):
        parser.error("a rehearsal measures nothing; give --out a folder outside bench/results")
    if not (args.rehearse or torch.cuda.is_available()):
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
        parser.error(f"no CUDA device ({built}); --rehearse runs all of it on a CPU")
    LIMITS_S.update(args.limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends what was started, too
    result = described() | {"rehearsal": args.rehearse, "phases": {}, "ceilings": [], "rows": []}
    if args.commit:
        result |= {"commit": args.commit, "uncommitted_changes": None}
    phases = [name for name in choices if name in args.only]
    with tempfile.TemporaryDirectory(prefix="hfprune_gpu_check_") as folder:
        run = Run(Path(folder), out, args.rehearse, result, "".join(f"-{name}" for name in phases))
        if run.phase("build"):
            for phase in ("compile", *phases):
                run.phase(phase)
    table = report(result)
    (run.logs / "check.md").write_text(table, encoding="utf-8")
    print("\n" + table, end="")
    sys.exit(any(phase["error"] for phase in result["phases"].values()))


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in LIMITS_S or not seconds.isdigit() or int(seconds) <= 2 * GRACE_S:
        raise argparse.ArgumentTypeError(
            f"expected PHASE=S, a phase and more than {2 * GRACE_S} seconds, got {text}"
        )
    return name, float(seconds)


def report(result: Result) -> str:
    """Return what became of the phases, and all rows."""
    lines = ["A rehearsal: its numbers mean nothing.", ""] if result["rehearsal"] else []
    for name, phase in result["phases"].items():
        lines.append(f"- {name}: {phase['error'] or 'ok'} ({phase['seconds']:.0f} s)")
        lines += [f"  - skipped: {reason}" for reason in phase.get("skipped", ())]
        lines += [f"  - {line}" for line in phase.get("tests", ())]
    rows = [rounded(row) for row in result["rows"]]  # as the file has them
    return "\n".join(lines) + "\n\n" + markdown({**result, "rows": rows})


class Run:
    """The phases; each writes what it found into result, and the result file is kept up to date."""

    def __init__(
        self, folder: Path, out: Path, rehearse: bool, result: Result, suffix: str
    ) -> None:
        self.folder, self.out, self.result, self.suffix = folder, out, result, suffix
        self.site, self.rehearse = folder / "site", rehearse
        self.logs = write(result, out, suffix).with_suffix(".check")
        self.logs.mkdir(exist_ok=True)
        path = [self.site, *(ROOT / "bench").glob("*/"), os.environ.get("PYTHONPATH", "")]
        self.env = {
            **os.environ,
            "HFPRUNE_BACKEND": "", "PYTEST_ADDOPTS": "",  # they would change what runs
            "PYTHONPATH": os.pathsep.join(filter(None, map(str, path))),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # fp32 products are fp32
            "TRITON_INTERPRET": str(int(rehearse)),
        }  # fmt: skip
        if rehearse:
            self.env["CUDA_VISIBLE_DEVICES"] = ""
            self.env["TORCH_COMPILE_DISABLE"] = "1"  # it compiles for minutes, and nothing is timed

    def phase(self, name: str) -> bool:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        self.deadline = start + LIMITS_S[name]
        (self.logs / f"{name}.log").unlink(missing_ok=True)
        entry: dict[str, Any] = {"error": None}
        self.result["phases"][name] = entry
        try:
            own = {"build": self.build, "compile": self.compile, "correctness": self.correctness}
            entry["error"] = own.get(name, partial(self.worker, name))(entry)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        entry["seconds"] = round(time.monotonic() - start, 1)
        print(f"{name}: {entry['seconds']:.0f} s, {entry['error'] or 'ok'}", flush=True)
        write(self.result, self.out, self.suffix)
        return entry["error"] is None

    def command(self, name: str, *command: str | Path, **env: str) -> str | None:
        """Run to the end or the limit; say in a line what went wrong, and print the log's end."""
        log, error = self.logs / f"{name}.log", None
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], env=self.env | env, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, process_group=0,
            )  # fmt: skip
            try:
                process.wait(self.deadline - GRACE_S - time.monotonic())
            except subprocess.TimeoutExpired:
                error = f"stopped, as {LIMITS_S[name]:.0f} s were running out"
                os.killpg(process.pid, signal.SIGINT)  # pytest then still reports what it has
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode == 0 and error is None:
            return None
        lines = log.read_text(errors="replace").rstrip().splitlines()
        print("\n".join(f"  {name}| {line[:200]}" for line in lines[-25:]), flush=True)
        return error or f"exit status {process.returncode}; the log's last line: {lines[-1:]}"

    def build(self, _: dict[str, Any]) -> str | None:
        """Build as pip does for any user, from a copy, so that nothing is written beside it."""
        tree = self.folder / "tree"
        skipped = ".*", "build", "tests", "bench", "*.egg-info", "__pycache__"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*skipped))
        pip = "-m pip --isolated install --no-index --no-deps --no-build-isolation"
        error = self.command("build", *pip.split(), "--target", self.site, tree)
        code = "import pathlib, sys, hfprune_fast.kernels as k; sys.exit(k.__file__ if not "
        code += f"pathlib.Path(k.__file__).resolve().is_relative_to({str(self.site.resolve())!r})"
        return error or self.command("build", "-c", code + " else 0)")

    def compile(self, _: dict[str, Any]) -> str | None:
        """Compile the launches of tools/aot.py, a process a core, into the cache of this run."""
        capability = self.result["machine"].get("capability", "9.0")
        few = ("--match", "bf16 forward") if self.rehearse else ()
        arch = f"sm_{capability.replace('.', '')}"
        command = (ROOT / "tools" / "aot.py", "--only-compile", "--arch", arch, *few)
        return self.command("compile", *command, TRITON_INTERPRET="0")

    def correctness(self, entry: dict[str, Any]) -> str | None:
        """Run the tests; keep pytest's count, what failed and why some were skipped."""
        error = self.command(
            "correctness", "-m", "pytest", *(ROOT / f"tests/gpu/test_{name}.py" for name in TESTS),
            "--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "-q", "--durations=15",
            "--tb=short", "-p", "no:cacheprovider",
        )  # fmt: skip
        log = (self.logs / "correctness.log").read_text(errors="replace").splitlines()
        told = [line for line in log if re.match("ERROR |FAILED |SKIPPED ", line)]
        entry["tests"] = [*log[-1:], *sorted(told)[:12]]  # failures first
        if not self.rehearse and not re.search(r"\d passed", entry["tests"][0]):
            return error or "no test passed"
        return error

    def worker(self, name: str, entry: dict[str, Any]) -> str | None:
        """Run gpu_<name>.py; what it found goes into the rows, and what else it said is kept."""
        out = self.folder / f"{name}.json"
        seconds = str(LIMITS_S[name] - 2 * GRACE_S)
        script = Path(__file__).with_name(f"gpu_{name}.py")
        error = self.command(name, script, out, seconds)
        if out.exists():
            found = json.loads(out.read_text())
            self.result["rows"] += found.pop("rows")
            self.result["ceilings"] = found.pop("ceilings", self.result["ceilings"])
            entry |= found
        return error or "; ".join(entry.get("errors", [])) or None


if __name__ == "__main__":
    main()
