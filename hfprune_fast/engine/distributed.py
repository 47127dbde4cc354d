"""Several processes on one job, as torchrun starts them: rank, share of the work, sums."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hfprune_fast.errors import ArgumentError, ProcessError, one_line, shown

T = TypeVar("T")
# One may finish long before the others; a process that died is noticed at once.
_PATIENCE = timedelta(days=2)
_START = "unset it for one process, or start several with torchrun"


@dataclass(frozen=True)
class Processes:
    """This process's rank and the number of processes; by default there is one."""

    rank: int = 0
    count: int = 1

    def deal(self, items: Sequence[T]) -> list[T]:
        """Return this process's share: every count-th item."""
        return list(items[self.rank :: self.count])

    def as_the_first(self, number: int) -> int:
        """Return the first process's number, in every process."""
        if self.count == 1:
            return number
        on = "cuda" if dist.get_backend() == "nccl" else "cpu"
        theirs = torch.tensor(number, device=on)
        with others_alive():
            dist.broadcast(theirs, 0)
        return int(theirs)

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, in every process."""
        if self.count > 1:
            with others_alive():
                dist.all_reduce(tensor)


@contextmanager
def others_alive() -> Iterator[None]:
    """Turn what torch raises where another process is gone into a ProcessError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # nccl's, gloo's
            raise
        raise ProcessError(
            "another process of this run ended before its part was done, nothing is written; its "
            f"own message or torchrun's says why ({one_line(error)})"
        ) from None


def launched() -> Processes:
    """Return this process's place among those that torchrun started, or raise ArgumentError.

    Its variables are checked together: with half of them a run would do its share of a job whose
    other processes do not exist.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]
    if len(missing) == 1:
        (other,) = {"RANK", "WORLD_SIZE"} - set(missing)
        raise ArgumentError(f"{other} is set but {missing[0]} is not; {_START}")
    for rank, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        default = _variable(rank, 0) + 1
        if not 0 <= _variable(rank, 0) < _variable(count, default):
            raise ArgumentError(
                f"{rank} must be in 0..{count}-1, got {rank} {_variable(rank, 0)} of {count} "
                f"{_variable(count, default)}; {_START}"
            )
    return Processes(_variable("RANK", 0), _variable("WORLD_SIZE", 1))


def local_processes() -> int:
    """Return how many of torchrun's processes share this machine."""
    return max(1, _variable("LOCAL_WORLD_SIZE", 1))


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ArgumentError(f"{name} must be a number, got {shown(text)}; {_START}")
    return int(text)


def own_device(device: str, processes: Processes) -> str:
    """Return the GPU of this process where "auto" or "cuda" leaves it open."""
    if processes.count > 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
        return f"cuda:{_variable('LOCAL_RANK', 0)}"
    return device


@contextmanager
def joined(device: torch.device, processes: Processes) -> Iterator[None]:
    """Connect the processes for the block, so that they can add up: gloo on CPUs, nccl on GPUs."""
    if processes.count == 1 or dist.is_initialized():
        yield
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    try:
        _connect("nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"the {processes.count} processes of this run cannot join: {one_line(error)}"
        ) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def _connect(backend: str) -> None:
    """Wait for the others in a thread: the main one can then be interrupted or terminated."""
    failures: list[Exception] = []

    def wait() -> None:
        try:
            dist.init_process_group(backend, timeout=_PATIENCE)
        except Exception as error:
            failures.append(error)

    waiting = Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join()
    if failures:
        raise failures[0]
