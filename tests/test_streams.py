"""Streams that are closed, full or broken: the work goes on, and the exit status is the truth."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hfprune_fast as hf
from hfprune_fast import console

Hfprune = Callable[..., Any]
PLAN = ["plan", "demo", "--prune-ratio", "0.2"]


def full_disk() -> io.TextIOWrapper:
    return open("/dev/full", "w", buffering=1, encoding="utf-8")


def closed() -> io.TextIOWrapper:
    stream = full_disk()
    stream.close()
    return stream


def broken_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


BROKEN: dict[str, Callable[[], Any]] = {
    "none": lambda: None, "closed": closed, "full": full_disk, "broken pipe": broken_pipe,
}  # fmt: skip


@pytest.mark.parametrize("stream", BROKEN)
def test_the_work_goes_on_without_stderr(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: str
) -> None:
    monkeypatch.setattr(sys, "stderr", BROKEN[stream]())
    out = tmp_path / "out"
    running = ["--calibration", "demo", "--samples", 2, "--seq-len", 32, "--preset", "paper"]
    assert hfprune("prune", "demo", *running, "--prune-ratio", 0.2, "--out", out).code == 0
    assert (out / "model.safetensors").exists()
    assert hfprune("plan", "demo").code == 2
    console.say("a message of a program that uses the package")


@pytest.mark.parametrize(("stream", "code"), [("none", 0), ("broken pipe", 141), ("full", 2)])
def test_stdout_that_takes_nothing(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, stream: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdout", BROKEN[stream]())
    run = hfprune(*PLAN)
    assert run.code == code
    assert run.err == ("hfprune: error: [Errno 28] No space left on device\n" if code == 2 else "")


def test_stdout_that_cannot_show_every_letter(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, llama_dir: Path
) -> None:
    taken = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(taken, encoding="latin-1"))
    folder = llama_dir.rename(llama_dir.with_name("m\xe9\u4e2d\x1b[31m\u202e\udcff"))
    assert hfprune("plan", folder, "--prune-ratio", 0.2).code == 0
    shown = taken.getvalue().decode("latin-1")
    assert "m\xe9\\u4e2d\\x1b[31m\\u202e\\udcff " in shown
    assert shown.replace("\n", "").isprintable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        ("2>/dev/full", 0), (">&- 2>&- <&-", 0), ("| true", 141), (">/dev/full", 2),
        ("| true 2>&-", 141),
    ],
)  # fmt: skip
def test_exit_codes_of_real_processes(tmp_path: Path, redirection: str, code: int) -> None:
    """Python itself exits with 120 where it cannot flush a stream."""
    command = '"$0" -m hfprune_fast score demo --calibration demo --samples 2 --seq-len 32 --out s'
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}; exit ${{PIPESTATUS[0]}}", sys.executable],
        cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == code
    assert hf.ImportanceTable.load(tmp_path / "s").provenance["samples"] == 2
