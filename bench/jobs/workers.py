"""A provider of a whole job in a process of its own, so that memory is measured apart.

A thread in it reads RssAnon, its anonymous memory in RAM, and RssFile, which shows weights that are
mapped from a file. The baseline is taken after a small model has gone through the same provider, so
that libraries hold their buffers; for a loaded model with its weights, for a folder without.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Worker:
    """Runs what `module.job(**arguments)` returns, repeatedly, in another process."""

    def __init__(self, *job: Any) -> None:
        self.process: Any = subprocess.Popen(
            [sys.executable, __file__, json.dumps(job)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"},
        )  # fmt: skip
        self.answer()

    def run(self) -> dict[str, Any]:
        """Run once; return seconds, and memory in bytes."""
        print("run", file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a worker ended with exit status {self.process.wait()}")


@contextmanager
def started(module: str, job: str, arguments: dict[str, Any]) -> Iterator[dict[str, Worker]]:
    """Yield one worker for each provider, all of them warm; end them afterwards."""
    workers: dict[str, Worker] = {}
    try:
        for name, of_one in arguments.items():  # one after the other, as they disturb each other
            workers[name] = Worker(module, job, of_one)
        yield workers
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.communicate()


def main() -> None:
    sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
    from meter import PeakMemory

    torch.set_num_threads(2)
    module, job, arguments = json.loads(sys.argv[1])
    run = getattr(importlib.import_module(module), job)(**arguments)
    print("{}", flush=True)
    for _ in sys.stdin:
        with PeakMemory() as memory:
            begin = time.perf_counter()
            run()
            seconds = time.perf_counter() - begin
        print(json.dumps({"s": seconds, **memory.fields}), flush=True)


if __name__ == "__main__":
    main()
