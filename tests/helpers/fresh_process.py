"""Code run in a Python process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def in_fresh_process(code: str, *arguments: object, cwd: Path, fails: bool = False) -> str:
    """Run code, which finds the arguments in sys.argv[1:]; return what it printed, or its error."""
    begin = f"import sys, torch\ntorch.set_num_threads({torch.get_num_threads()})\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout.strip()
