"""The folder beside an output that a recovery works in, from which an interrupted one continues."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint.atomic import write_whole
from hfprune_fast.checkpoint.folder import read_json_object
from hfprune_fast.checkpoint.resumed import beside, check_left, differing, of_another_run
from hfprune_fast.console import say
from hfprune_fast.engine.distributed import Processes
from hfprune_fast.errors import (
    CheckpointError,
    HFPruneError,
    MemoryShortageError,
    OutputError,
    ProcessError,
    is_out_of_memory,
)
from hfprune_fast.recovery.teacher import is_begun

_RUN, _TEACHER = "recovery.json", "teacher.safetensors"
_OURS = re.compile(r"recovery\.json|teacher\.safetensors|checkpoint-\d+|\..+\.partial-\w+")

# After these the same command may succeed, so that its work is kept.
_INTERRUPTIONS = (KeyboardInterrupt, SystemExit, OSError, MemoryShortageError, ProcessError)


class WorkFolder:
    """A run's hidden states, checkpoints and identity: `OUT.recovery`.

    Args:
        out: the run's output.
        identity: what tells the run from others.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.path = work_of(out)
        self._identity = json.loads(json.dumps(identity))

    @property
    def teacher(self) -> Path:
        """The file of the dense model's hidden states, where no other is named."""
        return self.path / _TEACHER

    def begin(self, *, resume: bool) -> None:
        """Make the folder, or take the one that an interrupted run of the same identity left.

        Without `resume`, what is there is deleted: `check_work` has refused it unless forced.

        Raises:
            ResumeError: what is there is of another run, with the difference named.
        """
        if not resume:
            self.delete()
        if not os.path.lexists(self.path):
            if resume:
                say(f"nothing to resume: there is no {self.path}; starting from the beginning")
            write_whole(self.path / _RUN, json.dumps(self._identity).encode())
            return
        found = read_json_object(self.path / _RUN)
        if differences := differing(found, self._identity):
            raise of_another_run(self.path, differences)

    @contextmanager
    def kept_if_interrupted(self, processes: Processes) -> Iterator[None]:
        """Say how to go on where the context is interrupted, or disk, memory or a process fails.

        After any other error, which another command must cure, a folder without work is deleted.
        """
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, _INTERRUPTIONS) or is_out_of_memory(error)
            if interrupted or (isinstance(error, OutputError) and self._has_work()):
                say(
                    f"what was done so far is in {self.path}; the same command with --resume "
                    "continues from there"
                )
            elif isinstance(error, HFPruneError) and processes.rank == 0 and not self._has_work():
                self.delete()
            raise

    def _has_work(self) -> bool:
        return is_begun(self.teacher) or any(self.path.glob("checkpoint-*"))

    def delete(self) -> None:
        """Delete the folder, of a run that is complete or discarded."""
        _delete(self.path)


def work_of(out: Path) -> Path:
    """Return the folder that a recovery to an output works in."""
    return beside(out, "recovery")


def check_work(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse what an interrupted run left, unless it is to be resumed, or `force` discards it.

    Raises:
        ResumeError: neither is given, or the folder is no such one.
    """
    check_left(work_of(out), _is_ours, "recover", resume=resume, force=force)


def _is_ours(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not all(_OURS.fullmatch(path.name) for path in folder.iterdir()):
        return False
    try:
        return bool(read_json_object(folder / _RUN)["recovery"])
    except (CheckpointError, KeyError):
        return False


def _delete(folder: Path) -> None:
    if _is_ours(folder):
        shutil.rmtree(folder)
