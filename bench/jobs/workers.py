"""A provider of a whole job in a process of its own, so that memory is measured apart.

A thread in it reads RssAnon, its anonymous memory in RAM, and RssFile, which shows weights that are
mapped from a file. The baseline is taken after a small model has gone through the same provider, so
that libraries hold their buffers; for a loaded model with its weights, for a folder without.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pkgutil import resolve_name
from typing import Any

import torch
from meter import PeakMemory

Run = Callable[[], dict[str, float]]  # returns seconds, and memory in bytes
_job: Callable[[], object]  # of a worker


@contextmanager
def started(job: str, arguments: dict[str, Any]) -> Iterator[dict[str, Run]]:
    """Start a warm worker for each provider, which runs what `job(**arguments)` returns.

    Args:
        job: "module:function", as tests are not importable by their own names.
        arguments: by provider.
    """
    workers: dict[str, Run] = {}
    with ExitStack() as stack:
        for name, of_one in arguments.items():  # one after the other, as they disturb each other
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            stack.enter_context(pool).submit(_prepare, job, of_one).result()
            workers[name] = lambda pool=pool: pool.submit(_run).result()  # type: ignore[misc]
        yield workers


def apart(job: str, **arguments: Any) -> Any:
    """Return what `job(**arguments)` returns in a process of its own; `job` is as in `started`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_called, job, arguments).result()


def _called(job: str, arguments: dict[str, Any]) -> Any:
    torch.set_num_threads(2)
    return resolve_name(job)(**arguments)


def _prepare(job: str, arguments: dict[str, Any]) -> None:
    global _job
    torch.set_num_threads(2)
    _job = resolve_name(job)(**arguments)


def _run() -> dict[str, float]:
    with PeakMemory() as memory:
        begin = time.perf_counter()
        _job()
        seconds = time.perf_counter() - begin
    return {"s": seconds, **memory.fields}
