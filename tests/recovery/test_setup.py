"""How a recovery runs on this machine: what it trains has room beside its batches."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions, RecoveryOptions, RunOptions
from hfprune_fast.engine.distributed import Processes
from hfprune_fast.errors import ArgumentError, MemoryShortageError
from hfprune_fast.recovery.data import recovery_data
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
