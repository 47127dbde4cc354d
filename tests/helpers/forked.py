"""Command lines in processes of their own, to be killed; forked from one with all imports done."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from hfprune_fast.cli import main
from hfprune_fast.engine import planner
from hfprune_fast.engine.plan import Plan
from hfprune_fast.scoring import job
from hfprune_fast.scoring.passes import Pass
from hfprune_fast.scoring.resume import ResumeFile

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hfprune_fast.cli", "transformers.models.llama.modeling_llama"])

Prepare = Callable[[], object]


@contextmanager
def hfprune_process(
    *args: Any, log: Path, prepare: Prepare | None = None, env: Mapping[str, str] | None = None
) -> Iterator[BaseProcess]:
    """Run a command line in a process, which is killed at the end of the context.

    Args:
        args: as a user types them.
        log: where stderr goes; stdout goes to a file beside it, with .out for a suffix.
        prepare: called in the process first; one of the functions below.
        env: variables to add to its environment.
    """
    process = _context.Process(target=_run, args=([str(a) for a in args], log, prepare, env or {}))
    with patch.dict(os.environ, PYTHONSAFEPATH="1"):  # for the server: see CONTRIBUTING.md
        forkserver.ensure_running()
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def hfprune_processes(
    number: int, *args: Any, prepare: Mapping[int, Prepare] | None = None
) -> Iterator[list[BaseProcess]]:
    """Run a command line in several processes, as torchrun does; their stderr is in log0, log1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {**LOOPBACK, "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(number)}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                hfprune_process(
                    *args,
                    log=Path(f"log{rank}"),
                    prepare=(prepare or {}).get(rank),
                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
            for rank in range(number)
        ]


# Where there is no network, or a name of this machine that leads nowhere.
LOOPBACK = {
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": next((n for _, n in socket.if_nameindex() if n[:2] == "lo"), "lo"),
}


def _run(args: list[str], log: Path, prepare: Prepare | None, env: Mapping[str, str]) -> None:
    for stream, path in ((1, log.with_suffix(".out")), (2, log)):
        with path.open("ab") as opened:
            os.dup2(opened.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    os.environ.update(env)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    try:
        main(args)
    finally:
        sys.stdout.flush()


def kill_at(function: str, number: int) -> Prepare:
    """SIGKILL the process instead of a call, counted from 0: kill_at("os:fsync", 3)."""
    return partial(_kill_at, function, number)


def _kill_at(function: str, number: int) -> None:
    calls = count()

    def kill() -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    do_first(function, kill)


def do_first(function: str, what: Callable[[], object]) -> None:
    """Do something before each call of a function."""
    original = resolve_name(function)

    def and_then(*args: Any, **options: Any) -> Any:
        what()
        return original(*args, **options)

    owner, _, name = function.replace(":", ".").rpartition(".")
    setattr(resolve_name(owner), name, and_then)


def kill_between(events: int, pass_tokens: int) -> Prepare:
    """SIGKILL the process after so many calls and returns, of any function, since its first pass.

    A clock would not do: on a busy machine the run might be through.

    Args:
        events: of Python's profiler.
        pass_tokens: how much a pass of a streamed run holds.
    """
    return partial(_kill_between, events, pass_tokens)


def _kill_between(events: int, pass_tokens: int) -> None:
    on_commit, plan, seen = ResumeFile.on_commit, job.plan_run, count()

    def kill(*_: Any) -> None:
        if next(seen) >= events:
            os.kill(os.getpid(), signal.SIGKILL)

    def first_commit(self: ResumeFile, *args: Any) -> None:
        on_commit(self, *args)
        ResumeFile.on_commit = on_commit  # type: ignore[method-assign]
        sys.setprofile(kill)

    def short_passes(*args: Any, **options: Any) -> Plan:
        return replace(plan(*args, **options), pass_tokens=pass_tokens)

    ResumeFile.on_commit = first_commit  # type: ignore[method-assign]
    job.plan_run = short_passes


def processor_seconds(seconds: int) -> Prepare:
    """Kill the process when it has used the processor for so long."""
    return partial(resource.setrlimit, resource.RLIMIT_CPU, (seconds, seconds))


def tokens_at_once(tokens: int) -> Prepare:
    """Make the planner put so many tokens into a micro-batch."""
    return partial(_tokens_at_once, tokens)


def _tokens_at_once(tokens: int) -> None:
    planner._TOKENS_AT_ONCE["cpu"] = tokens


def count_collectives() -> None:
    """Print a line to stderr for whatever the processes say to one another."""
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "reduce"):
        setattr(dist, name, partial(_counted, name, getattr(dist, name)))


def _counted(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    print(f"collective {name}", file=sys.stderr)
    return function(*args, **options)


def fail_in_pass(number: int) -> Prepare:
    """Raise an error in a pass, counted from 0."""
    return partial(_fail_in_pass, number)


def _fail_in_pass(number: int) -> None:
    add_to, passes = Pass.add_to, count()

    def failing(self: Pass, total: Any) -> Any:
        if next(passes) == number:
            raise RuntimeError("the device fell off the bus")
        return add_to(self, total)

    Pass.add_to = failing  # type: ignore[method-assign]
