"""Python code in a process of its own."""

import subprocess
import sys
from typing import Any


def in_another_process(code: str, *arguments: Any) -> str:
    """Run code there and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=240, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
