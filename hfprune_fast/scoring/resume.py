"""The file from which an interrupted scoring run is resumed.

It is a safetensors file of the tensors of `ScoreAccumulator`; its metadata contain the other fields
and the identity of the run. It is replaced atomically, so a killed run leaves the state after some
whole pass.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hfprune_fast.checkpoint.atomic import write_whole
from hfprune_fast.checkpoint.ours import STATE, is_ours
from hfprune_fast.checkpoint.resumed import beside, check_left, differing, of_another_run
from hfprune_fast.console import say
from hfprune_fast.errors import OutputError, ResumeError, one_line
from hfprune_fast.scoring.accumulator import ScoreAccumulator

_VERSION = 2
_TENSORS = ("statistics", "down_norm", "output_fisher", "experts")
_NUMBERS = ("samples", "tokens", "loss_nats")


class ResumeFile:
    """Saves the accumulator of a run, every `seconds` and at an interruption.

    Args:
        file: the file; None saves nothing.
        seconds: between two writes; 0 writes after each pass.
    """

    def __init__(self, file: Path | None, seconds: float) -> None:
        self._file, self._seconds = file, seconds
        self._written_at = time.monotonic()
        self._unwritten: tuple[ScoreAccumulator, int] | None = None
        self._saved_samples = 0  # sequences of this run that are in the file
        self._warned = False
        # What distinguishes this run from others: a JSON mapping with "batch_size" in it.
        self.identity: Mapping[str, Any] = {}

    def on_commit(self, total: ScoreAccumulator, max_batch_size: int) -> None:
        """Take new sums and the current limit of a micro-batch's sequences."""
        self._unwritten = total, max_batch_size
        if time.monotonic() - self._written_at >= self._seconds:
            self.write()

    def write(self) -> None:
        """Write the latest sums; a failure to write is reported once and does not end the run."""
        if self._file is None or self._unwritten is None:
            return
        self._written_at = time.monotonic()
        total, max_batch_size = self._unwritten
        header = {
            "format_version": _VERSION,
            "identity": self.identity,
            "max_batch_size": max_batch_size,
            **{name: getattr(total, name) for name in _NUMBERS},
        }
        fields = {name: getattr(total, name) for name in _TENSORS}
        tensors = {name: t.cpu().contiguous() for name, t in fields.items() if t is not None}
        header["digest"] = digest_of(header, tensors)
        try:
            write_whole(self._file, save(tensors, {STATE: json.dumps(header)}), _is_state)
        except OutputError as error:
            if not self._warned:
                say(f"the scores so far are only in memory, not saved for --resume: {error}")
            self._warned = True
        else:
            self._saved_samples, self._unwritten = total.samples, None

    @contextmanager
    def saved_if_interrupted(self, sequences: int) -> Iterator[None]:
        """Write when Ctrl-C, a signal or an error ends the context, and say how to resume."""
        try:
            yield
        except BaseException:
            self.write()
            if self._saved_samples:
                say(
                    f"{self._saved_samples} of {sequences} sequences are saved in {self._file}; "
                    "the same command with --resume continues from there"
                )
            raise

    def saved_identity(self) -> dict[str, Any]:
        """Return the identity of the run in the file; empty without a file."""
        if self._file is None or not self._file.exists():
            return {}
        return dict(_read(self._file)[0]["identity"])

    def discard(self) -> None:
        """Delete what an earlier run has left, as this one begins and does not continue it."""
        if self._file is not None and _is_state(self._file):
            self._file.unlink()

    def resume(
        self, like: ScoreAccumulator, lengths: Sequence[int]
    ) -> tuple[ScoreAccumulator, int] | None:
        """Return what the file holds, the sums and max_batch_size; None without a file.

        Args:
            like: an accumulator of the shape, dtype and device that the run needs.
            lengths: tokens of each of the run's sequences.

        Raises:
            ResumeError: the file is damaged, or of another run, with the difference named.
        """
        if self._file is None or not self._file.exists():
            say(f"nothing to resume: there is no {self._file}; starting from the beginning")
            return None
        header, tensors = _read(self._file)
        # The identity as it comes back from JSON, in which a tuple is a list.
        expected, found = json.loads(json.dumps(self.identity)), header["identity"]
        differences = differing(found, expected)
        values: dict[str, Any] = {name: header[name] for name in _NUMBERS}
        for name, tensor in tensors.items():
            ours = getattr(like, name)
            if ours is None or (tensor.shape, tensor.dtype) != (ours.shape, ours.dtype):
                differences.append(f"{name} of {tuple(tensor.shape)} {tensor.dtype}")
            else:
                values[name] = tensor.to(ours.device)
        missing = [n for n in _TENSORS if n not in tensors and getattr(like, n) is not None]
        differences += [f"no {name}" for name in missing]
        scored = lengths[: header["samples"]]
        counts = {"samples": len(scored), "tokens": sum(scored)}
        differences += differing({name: header[name] for name in counts}, counts)
        if len(values["loss_nats"]) != len(like.loss_nats):
            differences.append(f"{len(values['loss_nats'])} losses, not {len(like.loss_nats)}")
        if differences:
            raise of_another_run(self._file, differences)
        self._saved_samples = header["samples"]
        say(f"continuing after {self._saved_samples} sequences, from {self._file}")
        values["loss_nats"] = tuple(values["loss_nats"])
        return ScoreAccumulator(**values), header["max_batch_size"]


def state_of(out: Path) -> Path:
    """Return the file that saves the state of scoring for an output."""
    return beside(out, "state")


def check_state(out: Path, *, resume: bool, force: bool) -> None:
    """Raise ResumeError over a state of an interrupted run unless `resume` or `force`."""
    check_left(state_of(out), _is_state, "score", resume=resume, force=force)


def delete_state(out: Path) -> None:
    """Delete the state of a run that is complete; what else has come to be there stays."""
    if _is_state(state_of(out)):
        state_of(out).unlink()


def digest_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of all that a state holds, but for the digest itself."""
    own = {key: value for key, value in header.items() if key != "digest"}
    digest = hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_state(file: Path) -> bool:
    return is_ours(file, STATE)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        if not file.is_file():  # opening a pipe would wait for its writer
            raise ValueError("not a regular file")
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[STATE])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if header["format_version"] != _VERSION:
            raise ValueError(f"format version {header['format_version']}, not {_VERSION}")
        if header["digest"] != digest_of(header, tensors):
            raise ValueError("its digest is that of other contents")
        counts = {name: header[name] for name in ("max_batch_size", "samples", "tokens")}
        identity = header["identity"]
        counts["batch_size"] = identity["batch_size"]
        if identity.get("logits_budget_bytes") is not None:
            counts["logits_budget_bytes"] = identity["logits_budget_bytes"]
        for name, count in counts.items():
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} is {count}")
        if not {"statistics", "down_norm"} <= tensors.keys() <= set(_TENSORS):
            raise ValueError(f"it holds {', '.join(tensors)}")
        if not all(type(loss) is float and math.isfinite(loss) for loss in header["loss_nats"]):
            raise ValueError(f"loss_nats is {header['loss_nats']}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        cure = "--force discards it" if _is_state(file) else "moving it away"
        raise ResumeError(
            f"{file} is not what an interrupted `hfprune score` left, or is damaged "
            f"({one_line(error)}); {cure} and starts again"
        ) from None
    return header, tensors
