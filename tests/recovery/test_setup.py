"""How a recovery runs on this machine: what it trains has room beside its batches."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions, RecoveryOptions, RunOptions
from hfprune_fast.engine import machine
from hfprune_fast.engine.distributed import Processes
from hfprune_fast.errors import ArgumentError, MemoryShortageError
from hfprune_fast.recovery.data import recovery_data
from hfprune_fast.recovery.estimate import held_bytes
from hfprune_fast.recovery.setup import Setup, open_all, set_up
from hfprune_fast.recovery.teacher import TeacherFile


@pytest.mark.parametrize(
    ("train", "dtype", "teacher"),
    [("all", "float32", "cached"), ("mlp", "float32", "resident"), ("mlp", "float64", "cached")],
)
def test_gradients_and_moments_have_room_in_the_memory_budget(
    halves: Callable[[str], Path], text: Path, train: str, dtype: str, teacher: str
) -> None:
    options = RecoveryOptions(
        tokens=32 * 24, batch_tokens=32 * 24, lora=0, train=train, teacher=teacher
    )
    dense, pruned = open_source(TINY_MODEL), open_source(halves("custom"))
    data = recovery_data(text, dense, CalibrationOptions(seq_len=32), options)

    def at(budget: int | None) -> Setup:
        memory = None if budget is None else str(budget)
        run = RunOptions(dtype=dtype, device="cpu", memory_budget=memory)
        return set_up(dense, pruned, options, run, data, Processes(), 0)

    plan, spec = at(None).plan, pruned.spec
    mlps = sum(spec.widths) * spec.params_per_neuron
    trained = spec.total_params if train == "all" else mlps
    of_dense = spec.vocab_size * spec.hidden_size
    if teacher == "resident":
        of_dense = dense.spec.total_params
    held = (8 if dtype == "float64" else 4) * (spec.total_params + 3 * trained + of_dense)
    assert plan.weights_bytes == held
    fits = at(plan.total_bytes)
    assert fits.batch_size == at(None).batch_size
    short = at(plan.total_bytes - 1)
    assert short.batch_size < fits.batch_size or short.recompute
    with pytest.raises(MemoryShortageError, match=r"too small: at least about .* is needed here"):
        at(held)


@pytest.mark.parametrize(("days", "told"), [(0.9, 0), (1.1, 1)])
def test_what_takes_days_is_told(
    halves: Callable[[str], Path], text: Path, days: float, told: int, capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = RecoveryOptions(tokens=32 * 24, batch_tokens=64, held_out=4)
    dense, pruned = open_source(TINY_MODEL), open_source(halves("custom"))
    data = recovery_data(text, dense, CalibrationOptions(seq_len=32), options)
    # As `hfprune plan --recover` counts them.
    trained = held_bytes(
        pruned.transformers_config, pruned.spec, (pruned.spec.widths, None), options,
        torch.float32, dense.spec.total_params,
    )[0]  # fmt: skip
    linear, head = pruned.spec.linear_params_at(pruned.spec.widths), 2048 * 128
    of_student = 4 * linear + 2 * head + 6 * trained
    flops = 32 * (28 * 2 * dense.spec.linear_params + 24 * of_student)
    speed = flops / (days * 24 * 3600)
    monkeypatch.setattr(machine, "product_flops_per_second", lambda *_: speed)
    run = RunOptions(dtype="float32", device="cpu")
    capfd.readouterr()
    set_up(dense, pruned, options, run, data, Processes(), 0)
    line = "hfprune: 768 tokens in 12 steps are about 26.4 h of products at this machine's speed\n"
    assert capfd.readouterr().err == line * told


@pytest.mark.parametrize("there", ["nothing", "a part"])
def test_a_process_without_the_first_ones_file_is_refused(
    halves: Callable[[str], Path], text: Path, tmp_path: Path, there: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It would train on the zeros of a file that it made itself."""
    options = RecoveryOptions(tokens=32 * 24, batch_tokens=32 * 24)
    dense, pruned = open_source(TINY_MODEL), open_source(halves("custom"))
    data = recovery_data(text, dense, CalibrationOptions(seq_len=32), options)
    run = RunOptions(dtype="float32", device="cpu")
    setup = set_up(dense, pruned, options, run, data, Processes(), 0)
    monkeypatch.setattr(Processes, "as_the_first", lambda _, value: value)
    second, cache = replace(setup, processes=Processes(rank=1, count=2)), tmp_path / "states"
    if there == "a part":
        identity = {"model": dense.fingerprint, "windows": data.data.sha256}
        TeacherFile(cache, identity, (*data.ids.shape, dense.spec.hidden_size), setup.dtype)
    with ExitStack() as stack, pytest.raises(ArgumentError, match="all of them must share"):
        open_all(stack, dense, pruned, data, second, cache, progress=False)
    assert cache.exists() == (there == "a part")
