"""Check and time every kernel on the GPU at hand; under 8 minutes, no network, nothing to install.

    python bench/gpu_check.py --out bench/results
    python bench/gpu_check.py --only scoring streamed --out bench/results
    python bench/gpu_check.py --only timing --timing-seconds 560 --out bench/results

It needs what a stock CUDA image has: torch, triton, transformers, pytest, pip and setuptools. It
builds the package into a temporary folder, runs `tests/gpu` there, and times each kernel beside its
floor and its peers (`gpu_times.py`; liger-kernel and cut-cross-entropy where they are installed).
It writes DIR/<machine>-<date>.json, in the form that `report.py` makes tables of, and in
DIR/<machine>-<date>.check/ the verdicts on targets (check.md) and a log of each phase. A second run
of the same commit on the same day keeps what the first found and it does not measure anew. Each
phase has a process and a time limit of its own, so one that fails loses no other. These are added,
or with `--only` run alone, which leaves out the others but for the build:

    --scoring    an 8B model scored, beside the paper's arithmetic (`gpu_scoring.py`), 2.5 minutes
    --streamed   a 70B's layers brought from disk and RAM (`gpu_streamed.py`), up to 4 minutes; it
                 takes 25 GB of disk under TMPDIR and 45 GB of host memory, less where there is less
    --tune       a sweep of the kernels' configurations (`gpu_times.py`), up to 6 minutes

The build, --scoring and --streamed are under 8 minutes together. The kernels' rows that have no
time left say so: the third command above has time for fp32, the series of sizes and torch.compile.
`--rehearse` runs on a CPU.

The exit status is 0 when all ran and was correct, whatever the times; 1 when a phase or a test
failed; 2 when there is no CUDA device or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # not there with PYTHONSAFEPATH
from gpu_report import report
from records import Result, ResultError, described, key, read, write

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
# Seconds a phase may take. The first three are a run without options: under 8 minutes, and so are
# the build and the two that score.
LIMITS_S = {
    "build": 90, "correctness": 215, "timing": 170, "scoring": 150, "streamed": 235, "tune": 355,
}  # fmt: skip
DEFAULT, OPTIONAL = ("correctness", "timing"), ("scoring", "streamed", "tune")
# Before the limit a process is asked to end, and a worker this long before that starts nothing new.
GRACE_S = 25


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=DEFAULT + OPTIONAL, metavar="PHASE")
    parser.add_argument("--scoring", action="store_true", help="score an 8B model as well")
    parser.add_argument("--streamed", action="store_true", help="stream a 70B's layers as well")
    parser.add_argument("--tune", action="store_true", help="sweep configurations as well")
    parser.add_argument("--timing-seconds", type=int, default=LIMITS_S["timing"], metavar="S",
                        help="how long the kernels' rows may take")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.rehearse and out.is_relative_to(BENCH / "results"):
        parser.error("a rehearsal measures nothing; give --out a folder outside bench/results")
    if not args.rehearse and (reason := no_device()):
        print(f"gpu_check.py: {reason}; --rehearse runs all of it on a CPU", file=sys.stderr)
        sys.exit(2)
    wanted = {*(args.only or DEFAULT), *(name for name in OPTIONAL if getattr(args, name))}
    phases = [name for name in DEFAULT + OPTIONAL if name in wanted]
    LIMITS_S["timing"] = args.timing_seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends what was started, too
    result: Result = {**provenance(args.rehearse), "phases": {}, "ceilings": [], "rows": []}
    try:
        before = earlier(result, out)
    except ResultError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        sys.exit(2)
    beside = out / f"{result['machine']['name']}-{result['date'][:10]}.check"
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hfprune_gpu_check_") as folder:
        run = Run(Path(folder), beside, args.rehearse, result, before)
        if run.phase("build"):
            for phase in phases:
                run.phase(phase)
    table = report(joined(before, result))
    (beside / "check.md").write_text(table, encoding="utf-8")
    print("\n" + table, end="")
    sys.exit(any(phase["error"] for phase in result["phases"].values()))


def no_device() -> str | None:
    """Why nothing can run here, in a few words."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if torch.cuda.is_available():
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"no CUDA device (torch {torch.__version__}, built with {built})"


def provenance(rehearsal: bool) -> Result:
    def sha256(folder: str) -> str:
        sources = hashlib.sha256()
        for path in sorted((ROOT / folder).glob("*.py")):
            sources.update(path.read_bytes())
        return sources.hexdigest()

    hashes = {"kernels_sha256": sha256("kernels"), "package_sha256": sha256("hfprune_fast")}
    return {**described(), "rehearsal": rehearsal, **hashes}


def earlier(result: Result, folder: Path) -> Result | None:
    """The file that was written there on the same day, if there is one; of this commit or refused.

    Raises:
        ResultError: it is of another commit, and writing would lose it.
    """
    path = folder / f"{result['machine']['name']}-{result['date'][:10]}.json"
    if not path.exists():
        return None
    found = read(path)
    if found["commit"] != result["commit"]:
        raise ResultError(f"{path} is of another commit; give another --out, or remove it")
    return found


def joined(before: Result | None, result: Result) -> Result:
    """The result with what before has that it has not measured anew."""
    if before is None:
        return result
    rows = {key(row): row for row in before["rows"]}
    for row in result["rows"]:
        if "skipped" not in row or key(row) not in rows:
            rows[key(row)] = row
    ceilings = result["ceilings"] or before.get("ceilings", [])
    phases = {**before.get("phases", {}), **result["phases"]}
    found = {**before, **result, "phases": phases, "rows": list(rows.values())}
    return {**found, "ceilings": ceilings}


class Run:
    """The phases; each writes what it found into result, and the result file is kept up to date."""

    def __init__(
        self, folder: Path, out: Path, rehearse: bool, result: Result, before: Result | None
    ) -> None:
        self.folder, self.out, self.result, self.before = folder, out, result, before
        self.site = folder / "site"
        hidden = ("HFPRUNE_BACKEND", "PYTEST_ADDOPTS")  # they would change what runs
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        path = [str(self.site), str(BENCH), env.get("PYTHONPATH", "")]
        self.env = {
            **env,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # fp32 products are fp32
            "TRITON_INTERPRET": str(int(rehearse)),
        }
        if rehearse:
            self.env["CUDA_VISIBLE_DEVICES"] = ""

    def phase(self, name: str) -> bool:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        self.deadline = start + LIMITS_S[name]
        (self.out / f"{name}.log").unlink(missing_ok=True)
        entry: dict[str, Any] = {"error": None}
        self.result["phases"][name] = entry
        try:
            entry["error"] = getattr(self, name)()
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        entry["seconds"] = round(time.monotonic() - start, 1)
        print(f"{name}: {entry['seconds']:.0f} s, {entry['error'] or 'ok'}", flush=True)
        write(joined(self.before, self.result), self.out.parent)
        return entry["error"] is None

    def command(self, name: str, *command: str | Path) -> str | None:
        """Run to the end or the limit; say in a line what went wrong, and print the log's end."""
        log, error = self.out / f"{name}.log", None
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], env=self.env, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, process_group=0,
            )  # fmt: skip
            try:
                process.wait(self.deadline - GRACE_S - time.monotonic())
            except subprocess.TimeoutExpired:
                error = f"stopped, as {LIMITS_S[name]} s were running out"
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

    def build(self) -> str | None:
        """Build as pip does for any user, from a copy, so that nothing is written beside it."""
        tree = self.folder / "tree"
        skipped = (
            ".git", ".venv", "build", "tests", "bench", "*.egg-info", "__pycache__", ".*_cache"
        )  # fmt: skip
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*skipped))
        pip = "-m pip --isolated install --no-index --no-deps --no-build-isolation"
        error = self.command("build", *pip.split(), "--target", self.site, tree)
        info = self.folder / "info.json"
        error = error or self.command("build", BENCH / "gpu_times.py", "info", "--out", info)
        if error:
            return error
        found = json.loads(info.read_text())
        if not Path(found["package"]).resolve().is_relative_to(self.site.resolve()):
            return f"the package was imported from {found['package']}, not from {self.site}"
        return None

    def correctness(self) -> str | None:
        xml = self.folder / "junit.xml"
        error = self.command(
            "correctness", "-m", "pytest", ROOT / "tests" / "gpu", "--rootdir", ROOT,
            "-c", ROOT / "pyproject.toml", "-q", "--durations=15", "--tb=short",
            "-p", "no:cacheprovider", f"--junitxml={xml}",
        )  # fmt: skip
        if not xml.exists():
            return error or "pytest left no report"
        counts: dict[str, Any] = {
            "passed": 0,
            "failed": 0,
            "skipped": 0,
            "failures": [],
            "skips": [],
        }
        for case in ElementTree.parse(xml).iter("testcase"):
            problem = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
            if problem is None:
                counts["passed"] += 1
                continue
            message = (problem.get("message") or "").strip().splitlines()[:1]
            text = f"{case.get('name')}: {''.join(message)[:300]}"
            skip = problem.tag == "skipped"
            counts["skipped" if skip else "failed"] += 1
            counts["skips" if skip else "failures"].append(text)
        self.result["correctness"] = counts
        if not counts["passed"] and not self.result["rehearsal"]:
            return error or "no test ran"
        return error

    def timing(self) -> str | None:
        """What is wrong of ours is an error; what is wrong of a peer is a row that says so."""
        error = self._worker("timing", "gpu_times.py", "timing")
        wrong = [row for row in self.result["rows"] if "failed" in row]
        ours = [f"{row['op']}: {row['failed']}" for row in wrong if "ours" in row["provider"]]
        return error or "; ".join(ours) or None

    def tune(self) -> str | None:
        return self._worker("tune", "gpu_times.py", "tune")

    def scoring(self) -> str | None:
        return self._scores("scoring")

    def streamed(self) -> str | None:
        return self._scores("streamed")

    def _scores(self, name: str) -> str | None:
        error = self._worker(name, f"gpu_{name}.py")
        found = self.result.get(name, {})
        self.result["rows"] += found.pop("records", [])
        return error or "; ".join(found.get("errors", [])) or None

    def _worker(self, name: str, *worker: str) -> str | None:
        found = self.folder / f"{name}.json"
        options = "--out", found, "--seconds", str(LIMITS_S[name] - 2 * GRACE_S)
        error = self.command(name, BENCH / worker[0], *worker[1:], *options)
        if found.exists():
            self.result.update(json.loads(found.read_text()))
        return error


if __name__ == "__main__":
    main()
