"""Ctrl-C, SIGTERM and SIGKILL of a command: no unfinished output is left, or it is said."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import hfprune_process, kill_at
from refusals import assert_refused

import hfprune_fast as hf

Hfprune = Callable[..., Any]


PRUNE_DEMO = ["prune", "demo", "--calibration", "demo", "--samples", "32", "--prune-ratio", "0.2"]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_while_scoring_leaves_nothing(
    tmp_path: Path, how: signal.Signals, code: int
) -> None:
    def heed_signals() -> None:  # a job in the background inherits that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "hfprune_fast", *PRUNE_DEMO, "--out", "out"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=heed_signals
    ) as process:
        assert process.stderr is not None
        seen = ""
        while "scoring:" not in seen:
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        time.sleep(0.2)  # the bar is being made
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    said = "interrupted" if how == signal.SIGINT else "terminated"
    assert f"hfprune: {said}; no unfinished output is left" in err.splitlines()
    assert {path.name for path in tmp_path.iterdir()} <= {"out.state"}


def test_sigkill_while_writing_leaves_no_output(tmp_path: Path, hfprune: Hfprune) -> None:
    """Killed when weights and config are written and the tokenizer is about to be copied."""
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    arguments = ["prune", "demo", "--criterion", "magnitude", "--prune-ratio", "0.2", "--out"]
    at_the_copy = kill_at("shutil:copyfile", 0)
    with hfprune_process(*arguments, folder / "out", log=log, prepare=at_the_copy) as process:
        process.join(120)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    (leftover,) = folder.iterdir()
    assert leftover.name.startswith(".out.partial-")
    assert (leftover / "model.safetensors").exists()
    again = hfprune(*arguments, folder / "out")  # the next run says so, and works
    assert again.code == 0, again.err
    assert f"{leftover} is left over from a run that was killed" in again.err


def test_scores_survive_an_output_that_fails(
    llama_dir: Path, text_file: Path, tmp_path: Path, hfprune: Hfprune,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfprune_fast.checkpoint.writer.SafetensorsWriter", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = hfprune(
        "prune", llama_dir, "--calibration", text_file, "--samples", 2, "--seq-len", 32,
        "--prune-ratio", 0.1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert_refused(run, "No space left on device")
    kept = re.search(r"the scores are saved in (.*)", run.err)[1]  # type: ignore[index]
    assert hf.ImportanceTable.load(kept).l1.shape == (3, 96)
    assert not (tmp_path / "out").exists()
