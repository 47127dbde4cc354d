"""The dense model as a teacher: it runs once, and its final hidden states are kept in a file.

They give its logits exactly, by its head, at D numbers a token where the logits are V. The file is
a safetensors file made at its full size: `done`, how many windows are in it, and `hidden`, (N, T,
D) in the dtype that the model ran in. It is mapped, so it takes no memory of its own, and a run
that was interrupted continues after the last window.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfprune_fast.checkpoint.atomic import check_writable, whole_file
from hfprune_fast.checkpoint.folder import TORCH_DTYPES
from hfprune_fast.checkpoint.loading import Blueprint
from hfprune_fast.checkpoint.ours import is_ours
from hfprune_fast.checkpoint.resumed import differing
from hfprune_fast.config import RunOptions
from hfprune_fast.console import token_bar
from hfprune_fast.data.batches import MicroBatch, TokenData
from hfprune_fast.engine.planner import plan_run
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import ArgumentError, ResumeError, one_line

TEACHER = "hfprune_teacher"  # the metadata key of such files
_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_SYNC_SECONDS = 10.0
_MAX_HEADER_BYTES = 1 << 20


class TeacherFile:
    """Final hidden states (N, T, D) of a model over token windows, in a mapped file.

    Args:
        path: the file; it is made if there is none.
        identity: what tells the states of one model and text from others.
        shape, dtype: of the states.

    Raises:
        ResumeError: the file is damaged, or holds states of another model or text.
        OutputError: it cannot be made, or there is no room for it.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        begin = _check(path, identity, shape, dtype) if os.path.lexists(path) else None
        if begin is None:
            begin = _make(path, identity, shape, dtype)
        size = begin + 8 + math.prod(shape) * dtype.itemsize
        bits = np.dtype(f"u{dtype.itemsize}")
        is_damaged = path.stat().st_size != size  # a short file would be filled up with zeros
        if not is_damaged:
            self._done = np.memmap(path, "<i8", "r+", begin, (1,))
            self._hidden = np.memmap(path, bits, "r+", begin + 8, shape)
            is_damaged = not 0 <= self.done <= shape[0]
        if is_damaged:
            raise ResumeError(f"{path} is damaged; delete it, and the dense model runs again")
        self._appended, self._synced = self.done, time.monotonic()

    @property
    def done(self) -> int:
        """How many windows are in the file, on the disk."""
        return int(self._done[0])

    @property
    def is_whole(self) -> bool:
        return self.done == self.shape[0]

    def append(self, hidden: Tensor) -> None:
        """Add the states (B, T, D) of the next windows; every few seconds they are synced."""
        begin, self._appended = self._appended, self._appended + len(hidden)
        self._view(slice(begin, self._appended)).copy_(hidden)
        is_last = self._appended == self.shape[0]
        if is_last or time.monotonic() - self._synced > _SYNC_SECONDS:
            self._hidden.flush()  # before `done` says that they are there
            self._done[0] = self._appended
            self._done.flush()
            self._synced = time.monotonic()

    def read(self, windows: Sequence[int]) -> Tensor:
        """Return a copy of the states of some windows, (B, T, D)."""
        return torch.stack([self._view(slice(n, n + 1))[0] for n in windows])

    def _view(self, windows: slice) -> Tensor:
        return torch.from_numpy(self._hidden[windows].view(f"i{self.dtype.itemsize}")).view(
            self.dtype
        )


def hidden_bytes(windows: int, tokens: int, hidden: int, dtype: torch.dtype) -> int:
    """Return the bytes of a teacher's states."""
    return windows * tokens * hidden * dtype.itemsize


def fill(
    file: TeacherFile, dense: Blueprint, data: TokenData, run: RunOptions, progress: bool
) -> None:
    """Run the dense model over the windows that are not in the file yet.

    It is streamed if it does not fit, and then its weights are fetched once for each pass.
    """
    if file.is_whole:
        return
    plan = plan_run(
        dense.source.spec,
        run,
        device=dense.device,
        dtype=dense.dtype,
        seq_len=data.longest,
        sequences=data.sequences,
    )
    ids = data.batches[0].ids[file.done :]
    remaining = MicroBatch(ids, (ids.shape[1],) * len(ids))
    in_pass = max(plan.batch_size, plan.pass_tokens // data.longest)
    with (
        token_bar("the dense model's hidden states", remaining.tokens, progress) as on_progress,
        open_model(dense, plan.offload) as model,
    ):
        for some in remaining.split(in_pass):
            for hidden in model.final_hidden(some.split(plan.batch_size), on_progress):
                file.append(hidden)


def check_cache(path: Path, written: Sequence[Path]) -> None:
    """Refuse a file for hidden states that is another's, or lies in what else is written."""
    real_path = path.resolve()
    for folder in written:
        if real_path == folder.resolve() or folder.resolve() in real_path.parents:
            raise ArgumentError(f"cache {path} is or is inside {folder}, which the run writes")
    if os.path.lexists(path) and not is_teacher(path):
        raise _not_ours(path)


def _not_ours(path: Path) -> ResumeError:
    return ResumeError(
        f"{path} is not a file of a dense model's hidden states; move it away, or name another"
    )


def is_teacher(path: Path) -> bool:
    """Return whether a file is one of a teacher's states."""
    return is_ours(path, TEACHER)


def is_begun(path: Path) -> bool:
    """Return whether a file of a teacher's states holds any."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.get_tensor("done")[0]) > 0
    except (OSError, SafetensorError):
        return False


def _make(
    path: Path, identity: Mapping[str, Any], shape: tuple[int, int, int], dtype: torch.dtype
) -> int:
    """Make an empty file with room for all states; return where `done` begins."""
    nbytes = math.prod(shape) * dtype.itemsize
    header = json.dumps(
        {
            "__metadata__": {TEACHER: json.dumps(identity)},
            "done": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
            "hidden": {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [8, 8 + nbytes]},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    check_writable(path, nbytes, "the hidden states' file")
    with whole_file(path, lambda _: False) as partial, partial.open("xb") as file:
        # A page of a mapped file that the disk has no room for would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 16 + len(header) + nbytes)
        else:
            file.truncate(16 + len(header) + nbytes)
        file.write(len(header).to_bytes(8, "little") + header)
    return 8 + len(header)


def _check(
    path: Path, identity: Mapping[str, Any], shape: tuple[int, int, int], dtype: torch.dtype
) -> int:
    """Refuse a file of other states; return where `done` begins."""
    if not is_teacher(path):
        raise _not_ours(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
        found = json.loads(header["__metadata__"][TEACHER])
        found |= {name: header["hidden"][name] for name in ("dtype", "shape")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResumeError(
            f"{path} is damaged ({one_line(error)}); delete it, and the dense model runs again"
        ) from None
    expected = {**identity, "dtype": _DTYPES[dtype], "shape": list(shape)}
    if differences := differing(found, expected):
        raise ResumeError(
            f"{path} holds hidden states of another run: {'; '.join(differences)}; windows depend "
            "on the text, --tokens, --seq-len, --seed, --held-out and --batch-tokens; delete it, "
            "or name another file"
        )
    return 8 + size
