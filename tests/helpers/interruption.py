"""A small job for the command line that is interrupted: its state file and what is in it."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from truth import tiny_model

from hfprune_fast.scoring import criteria, passes

SEQUENCES, TOKENS, VOCAB = 24, 16, 127


def make_inputs(folder: Path) -> None:
    """Save a model and token ids, and others that differ from them in one thing."""
    for seed, name in enumerate(("model", "other_model")):
        tiny_model("llama", dtype=torch.float32, seed=seed).save_pretrained(folder / name)
    ids = np.random.default_rng(0).integers(0, VOCAB, (SEQUENCES, TOKENS))
    np.save(folder / "ids.npy", ids)
    np.save(folder / "longer.npy", np.concatenate([ids, ids[:, :1]], axis=1))
    ids[-1, -1] += 1
    np.save(folder / "other_ids.npy", ids)


def score_args(
    *flags: Any, out: str = "scores", model: str = "model", batch_size: int | None = 2
) -> list[Any]:
    """A run of twelve passes, unless the flags say otherwise."""
    sizes = [] if batch_size is None else ["--batch-size", batch_size]
    return ["score", model, "--calibration", "ids.npy", "--out", out, *sizes, *flags]


def state_of(out: str = "scores") -> Path:
    return Path(f"{out}.state")


def kept_samples(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        samples: int = json.loads(opened.metadata()["hfprune_state"])["samples"]
    return samples


def interrupt(patch: pytest.MonkeyPatch, at_pass: int, how: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a pass, counted from 0."""
    add_to = passes.Pass.add_to
    finished: list[Any] = []

    def counted(self: Any, total: Any) -> Any:
        finished.append(add_to(self, total))
        return finished[-1]

    def signalling(head_loss: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if len(finished) == at_pass:
            os.kill(os.getpid(), how)
        return head_loss(*args, **options)

    patch.setattr(passes.Pass, "add_to", counted)
    for name in ("linear_entropy", "linear_fisher"):
        patch.setattr(criteria, name, partial(signalling, getattr(criteria, name)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job


def assert_whole(run: Any, whole: str = "whole", out: str = "scores") -> None:
    """The scores are those of a run without interruption, and no state is left."""
    assert run.code == 0, run.err
    assert Path(out).read_bytes() == Path(whole).read_bytes()
    assert not state_of(out).exists()
