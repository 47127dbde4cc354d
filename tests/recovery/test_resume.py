"""A recovery that was interrupted continues, and ends as one that was not."""

import re
import shutil
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from forked import hfprune_process
from safetensors import SafetensorError, safe_open
from short_recovery import SHORT

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.errors import CalibrationError, CheckpointError, OutputError, ResumeError
from hfprune_fast.recovery import run, teacher, trainer
from hfprune_fast.recovery.estimate import checkpoints_bytes
from hfprune_fast.recovery.student import Student

Result = dict[str, Any]
Recover = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("one_thread")


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def stop_at(patch: pytest.MonkeyPatch, cls: Any, method: str, call: int) -> None:
    """Let Ctrl-C come in the middle of a run: at the so-manieth call of a method."""
    own, calls = getattr(cls, method), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return own(*args, **options)

    patch.setattr(cls, method, counted)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        pytest.param((Student, "forward"), 8, id="training"),
        pytest.param((Student, "held_out"), 3, id="checking", marks=pytest.mark.slow),
        pytest.param((teacher.TeacherFile, "append"), 3, id="teacher", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_recovery_ends_as_a_whole_one(
    recover: Recover, whole: Result, tmp_path: Path, where: tuple[Any, str], call: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "_SYNC_SECONDS", 0)
        stop_at(patch, *where, call)
        with pytest.raises(KeyboardInterrupt):
            recover(out="again")
    assert (tmp_path / "again.recovery").is_dir()
    assert not (tmp_path / "again").exists()
    again = recover(out="again", resume=True)
    assert again | {"out": whole["out"]} == whole
    assert weights(again["out"]) == weights(whole["out"])
    assert not (tmp_path / "again.recovery").exists()


@pytest.mark.slow
def test_only_what_is_missing_of_the_teacher_is_made(recover: Recover) -> None:
    made: list[int] = []
    append = teacher.TeacherFile.append

    def counted(file: Any, hidden: Any) -> None:
        made.append(len(hidden))
        append(file, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "_SYNC_SECONDS", 0)
        patch.setattr(teacher.TeacherFile, "append", counted)
        with pytest.MonkeyPatch.context() as stopping:
            stop_at(stopping, teacher.TeacherFile, "append", 3)
            with pytest.raises(KeyboardInterrupt):
                recover()
        assert sum(made) == 4  # two batches of two windows
        recover(resume=True)
    assert sum(made) == 28  # 24 to train on, 4 held out


def test_what_an_interrupted_run_left_is_resumed_or_discarded_on_request_only(
    recover: Recover, tmp_path: Path, capfd: Any
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Student, "forward", 8)
        with pytest.raises(KeyboardInterrupt):
            recover()
    line = f"what was done so far is in {tmp_path / 'out.recovery'}; the same command with --resume"
    assert line in capfd.readouterr().err
    for options, message in (
        ({}, "an interrupted run has left .*out.recovery; --resume continues it, --force discards"),
        (
            {"resume": True, "tokens": 32 * 26},
            "is of another run: .*tokens 768, not 832",
        ),
        ({"resume": True, "seed": 3}, "is of another run: windows"),
    ):
        with pytest.raises(ResumeError, match=message):
            recover(**options)
    (tmp_path / "out.recovery" / "mine.txt").write_text("keep me")
    for options in ({"force": True}, {"resume": True}):
        with pytest.raises(ResumeError, match="holds other files; move it away"):
            recover(**options)
    (tmp_path / "out.recovery" / "mine.txt").unlink()
    recover(force=True)
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Student, "forward", 1)
        with pytest.raises(KeyboardInterrupt):
            recover(force=True, resume=True)
    assert "nothing to resume: there is no " in capfd.readouterr().err


def test_a_full_disk_at_a_checkpoint_keeps_what_was_done(
    recover: Recover, whole: Result, capfd: Any
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_file", full)
        with pytest.raises(OutputError, match=r"out.recovery .*No space left.*; make room there"):
            recover()
    assert "the same command with --resume continues" in capfd.readouterr().err
    assert recover(resume=True) | {"out": whole["out"]} == whole


def test_a_disk_without_room_is_refused_before_any_work(recover: Recover, tmp_path: Path) -> None:
    room = shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: room._replace(free=100_000))
        with pytest.raises(OutputError, match=r"out .*takes \d.* only 97.7 KiB are free"):
            recover()
        patch.setattr(run, "on_one_disk", lambda *_: False)
        with pytest.raises(OutputError, match=r"cache .*takes \d.* only 97.7 KiB are free"):
            recover(cache=tmp_path / "states")
    assert not list(tmp_path.glob("*out*"))


def test_a_forced_run_that_is_refused_discards_nothing(recover: Recover, tmp_path: Path) -> None:
    """Of what an interrupted run left, whose bytes are room for the run that discards it."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Student, "held_out", 1)
        with pytest.raises(KeyboardInterrupt):
            recover()
    left = tmp_path / "out.recovery" / "teacher.safetensors"
    states, room = left.read_bytes(), shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: room._replace(free=0))
        with pytest.raises(OutputError, match=r"out .*takes .* only 0 B are free"):
            recover(force=True)
    with pytest.raises(CalibrationError):
        recover(force=True, text=tmp_path / "none.txt")
    assert left.read_bytes() == states
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, teacher.TeacherFile, "append", 1)  # the dense model runs again
        with pytest.raises(KeyboardInterrupt):
            recover(force=True)


def test_what_is_on_one_disk_is_added_up_and_what_is_left_is_not(
    recover: Recover, tmp_path: Path
) -> None:
    """A cache beside the output needs its room too, and a run without anything to resume all."""
    free, room = [0], shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: room._replace(free=free[0]))

        def needed(**options: Any) -> str:
            with pytest.raises(OutputError, match=r"out .*takes ") as caught:
                recover(**options)
            return str(re.search(r"takes (.*?),", str(caught.value)))

        whole = needed()
        assert whole == needed(cache=tmp_path / "states") == needed(resume=True)

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(trainer, "save_file", interrupted)
        free[0] = room.free
        with pytest.raises(KeyboardInterrupt):
            recover()
        free[0] = 0
        assert needed(resume=True) != whole
    assert (tmp_path / "out.recovery" / "teacher.safetensors").is_file()


def test_checkpoints_take_what_the_estimate_says(recover: Recover, tmp_path: Path) -> None:
    most, trained, save = [0], [0], trainer.save_file

    def saved(tensors: Any, path: Path) -> None:
        save(tensors, path)
        trained[0] = sum(tensor.numel() for tensor in tensors.values())
        files = (tmp_path / "out.recovery").glob("checkpoint-*/*")
        most[0] = max(most[0], sum(file.stat().st_size for file in files))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_file", saved)
        recover(lora=8)
    planned = checkpoints_bytes(trained[0] * 4 * 4)
    assert planned / 2 < most[0] < 1.1 * planned


def test_an_error_before_any_work_leaves_nothing_to_resume(
    recover: Recover, tmp_path: Path, capfd: Any
) -> None:
    def damaged(*_: Any, **__: Any) -> None:
        raise CheckpointError("a weight is NaN")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "open_model", damaged)
        with pytest.raises(CheckpointError, match="a weight is NaN"):
            recover()
    assert not (tmp_path / "out.recovery").exists()
    assert "--resume" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "model.safetensors"])
def test_a_damaged_checkpoint_is_left_out(
    recover: Recover, whole: Result, tmp_path: Path, capfd: Any, name: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Student, "forward", 8)
        with pytest.raises(KeyboardInterrupt):
            recover()
    for folder in (tmp_path / "out.recovery").glob("checkpoint-*"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    again = recover(resume=True)
    assert " is incomplete and is ignored" in capfd.readouterr().err
    assert again | {"out": whole["out"]} == whole


@pytest.mark.slow
def test_a_killed_recovery_ends_as_a_whole_one(
    recover: Recover, halves: Any, text: Path, tmp_path: Path
) -> None:
    """SIGKILL, after a checkpoint; a half-written one behind it is passed over."""
    options: dict[str, Any] = SHORT | {"tokens": 32 * 60}
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    command = ["recover", TINY_MODEL, halves("custom"), "--text", text, *chain(*flags)]
    log = tmp_path / "log"
    with hfprune_process(*command, "--out", tmp_path / "out", log=log) as killed:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "out.recovery").glob("checkpoint-*/trainer_state.json")):
            assert time.monotonic() < deadline
            assert killed.is_alive(), log.read_text()
            time.sleep(0.02)
        killed.kill()  # by SIGKILL
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.recovery" / "checkpoint-29").mkdir(exist_ok=True)
    resumed, whole = recover(resume=True, **options), recover(out="whole", **options)
    assert resumed | {"out": whole["out"]} == whole
    assert weights(resumed["out"]) == weights(whole["out"])


@pytest.mark.slow
def test_a_cache_serves_several_runs_on_one_text_alone(recover: Recover, tmp_path: Path) -> None:
    cache = tmp_path / "states"
    first = recover(cache=cache)
    made = cache.read_bytes()
    with safe_open(cache, framework="pt") as opened:  # it is a safetensors file
        assert opened.get_slice("hidden").get_shape() == [28, 32, 128]
        assert opened.get_tensor("done").tolist() == [28]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, teacher.TeacherFile, "append", 1)  # nothing is computed again
        assert recover(cache=cache, force=True) == first
    assert cache.read_bytes() == made
    for options, message in (
        ({"seed": 1}, "states holds hidden states of another run: windows "),
        ({"seq_len": 16}, "states holds hidden states of another run: windows "),
    ):
        with pytest.raises(ResumeError, match=message):
            recover(cache=cache, force=True, **options)
    # What was recovered is another model of the same shapes.
    with pytest.raises(ResumeError, match="states holds hidden states of another run: model "):
        recover(out="other", cache=cache, dense=tmp_path / "out", force=True)
    for size in (200, len(made) - 1000):
        cache.write_bytes(made[:size])
        with pytest.raises(ResumeError, match="states is damaged"):
            recover(cache=cache, force=True)
        assert cache.stat().st_size == size
    cache.write_text("notes of mine")
    with pytest.raises(ResumeError, match="not a file of a dense model's hidden states"):
        recover(cache=cache, force=True)
    assert cache.read_text() == "notes of mine"


@pytest.mark.slow
def test_a_streamed_teacher_makes_the_same_file(recover: Recover, tmp_path: Path) -> None:
    resident = recover(cache=tmp_path / "resident")
    streamed = recover(out="streamed", cache=tmp_path / "streamed-states", offload="disk")
    assert (tmp_path / "streamed-states").read_bytes() == (tmp_path / "resident").read_bytes()
    assert streamed | {"out": resident["out"]} == resident
