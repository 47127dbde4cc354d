"""Run the commands on the GPU as a user would, on the model that ships with the package.

Scores and removal costs must be those of float64 on the CPU as closely as float32's on the CPU are,
wherever the weights are; what is pruned and recovered must be as close to the dense model as what
the CPU makes. Each command is a process of its own; some run at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_phase import Phase
from meter import GPU
from models import relative_errors
from torch import Tensor

import hfprune_fast as hf

DEVICE = "cuda" if GPU else "cpu"
SAMPLES, TOKENS = (64, 100_000) if GPU else (4, 4_000)
# Times the error that float32 has on the CPU; the sums of a GPU run in another order, and its
# attention multiplies otherwise.
MORE_ERROR = 4.0
# A label that rounding draws otherwise changes one token's part of a fisher score.
OTHER_DRAWS = 2 / (SAMPLES * 256)
OF_BFLOAT16 = 0.1
# The KL of what a GPU prunes and of what the CPU does; ties may be broken otherwise.
MORE_KL = 1.05
RECIPES = {
    "paper": ("--preset", "paper"),
    "default": (),
    "reconstruct": ("--refit", "reconstruct"),
    "offload disk": ("--offload", "disk"),
    "bfloat16": ("--dtype", "bfloat16"),
}
TEACHERS: tuple[str, ...] = ("cached", "resident")
CRITERIA: dict[str, tuple[str, ...]] = {"entropy": (), "fisher": ("--obs",)}
if not GPU:  # a rehearsal of one of each
    RECIPES, TEACHERS = {"paper": RECIPES["paper"]}, ("cached",)
    CRITERIA = {"fisher": CRITERIA["fisher"]}
OF_THE_CPU = "default", "reconstruct", "paper"  # which the CPU prunes too
HELD_OUT = Path(hf.__file__).parent / "tiny" / "heldout.txt"
AT_ONCE = 8 if GPU else 1


class Commands:
    def __init__(self, phase: Phase) -> None:
        self.phase, self.folder = phase, phase.out.parent / "commands"
        self.folder.mkdir()
        self.verdicts: list[str] = []
        phase.result["tests"] = self.verdicts

    def run(self, name: str, *arguments: object) -> dict[str, Any]:
        """Return what a command says with --json; raise with the end of its log if it fails."""
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "hfprune_fast", *map(str, arguments), "--json"],
            capture_output=True, text=True, cwd=self.folder, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        self.phase.note(f"{name}: {time.monotonic() - begin:.1f} s")
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-400:]}")
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def check(self, text: str, is_right: bool) -> None:
        """Keep a comparison in words, and as an error unless it is right."""
        self.verdicts.append(text if is_right else f"{text} WRONG")
        self.phase.note(self.verdicts[-1])
        if not is_right:
            self.phase.result["errors"].append(text)

    def scores(self, device: str, dtype: str, *options: str) -> dict[str, Tensor]:
        """Return the statistics of entropy, and of fisher with removal costs, by full name."""
        found: dict[str, Tensor] = {}
        for criterion, more in CRITERIA.items():
            file = self.folder / f"{criterion}-{device}-{dtype}{''.join(options)}.safetensors"
            self.run(
                file.stem, "score", "demo", "--calibration", "demo", "--criterion", criterion,
                "--samples", SAMPLES, "--seq-len", 256, "--device", device, "--dtype", dtype,
                "--out", file, *more, *options,
            )  # fmt: skip
            found |= hf.ImportanceTable.load(file).statistics
        return found

    def compare_scores(self) -> None:
        ways = [("cpu", "float64"), ("cpu", "float32")]
        if GPU:
            ways += [(DEVICE, "bfloat16"), (DEVICE, "float32")]
            ways += [(DEVICE, "float32", "--offload", where) for where in ("cpu", "disk")]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            made = dict(zip(ways, pool.map(lambda way: self.scores(*way), ways), strict=True))
        truth, plain = made["cpu", "float64"], made["cpu", "float32"]
        for way, found in made.items():
            if way == ("cpu", "float64"):
                continue
            for name, want in truth.items():
                if way[1] == "bfloat16" and not name.startswith("entropy"):
                    continue  # other labels are drawn
                error, allowed = (
                    float(relative_errors(table[name], want).max()) for table in (found, plain)
                )
                allowed = MORE_ERROR * allowed
                if way[1] == "bfloat16":
                    allowed = OF_BFLOAT16
                elif not name.startswith("entropy"):
                    allowed += OTHER_DRAWS
                text = f"scores, {' '.join(way)}, {name}: off by {error:.1e} ({allowed:.1e})"
                self.check(text, error <= allowed)

    def prune(self, name: str, device: str) -> tuple[Path, float]:
        """Prune by a recipe; return the folder and its KL, as the CPU measures it in float32."""
        out = self.folder / f"{name.replace(' ', '-')}-{device}"
        self.run(
            f"prune, {name}, {device}", "prune", "demo", "--calibration", "demo", "--prune-ratio",
            0.2, "--samples", SAMPLES, "--seq-len", 256, "--device", device, "--out", out,
            *RECIPES[name],
        )  # fmt: skip
        return out, self.kl(out)

    def kl(self, pruned: Path) -> float:
        measured = self.run(
            f"evaluate {pruned.name}", "evaluate", "demo", pruned, "--text", HELD_OUT, "--samples",
            SAMPLES, "--seq-len", 256, "--device", "cpu", "--dtype", "float32",
        )  # fmt: skip
        return float(measured["kl_nats"])

    def compare_recipes(self) -> None:
        ways = [
            (name, device) for name in RECIPES for device in sorted({DEVICE, "cpu"})
            if device == DEVICE or name in OF_THE_CPU
        ]  # fmt: skip
        with ThreadPoolExecutor(AT_ONCE) as pool:
            made = dict(zip(ways, pool.map(lambda way: self.prune(*way), ways), strict=True))
        for name in RECIPES:
            wanted = made[name if name in OF_THE_CPU else "default", "cpu"][1]
            found = made[name, DEVICE][1]
            text = f"prune, {name}: KL {found:.4f}, the CPU's {wanted:.4f}"
            self.check(text, found <= MORE_KL * wanted)
        pruned, before = made["paper", DEVICE]
        for teacher in TEACHERS:
            out = self.folder / f"recovered-{teacher}"
            self.run(
                f"recover, {teacher}", "recover", "demo", pruned, "--text", "demo", "--tokens",
                TOKENS, "--seq-len", 256, "--teacher", teacher, "--device", DEVICE, "--out", out,
            )  # fmt: skip
            after = self.kl(out)
            text = f"recover, teacher {teacher}: KL {before:.4f} -> {after:.4f}"
            self.check(text, after < before)


def main() -> None:
    phase = Phase(*sys.argv[1:])  # of gpu_check.py: the file, the seconds
    commands = Commands(phase)
    for name, step in ("scores", commands.compare_scores), ("recipes", commands.compare_recipes):
        try:
            step()
        except Exception as error:
            phase.failed(name, error)
    phase.note("done")


if __name__ == "__main__":
    main()
