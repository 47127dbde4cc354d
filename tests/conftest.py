"""Small checkpoints, made on the spot, and the command line run in this process."""

import contextlib
import gc
import os

# OpenMP's threads, which otherwise spin at every barrier, sleep: tiny products take a sixth of the
# time where others use the processors too. torch reads it when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that fill the machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's interpreter, which runs kernels on a CPU, is chosen where triton and the kernels are
# first imported: here. The choice is kept for this process and hidden from those that tests start.
os.environ.setdefault("TRITON_INTERPRET", "1")
with contextlib.suppress(ImportError):
    import triton

    triton.knobs.runtime.interpret = os.environ["TRITON_INTERPRET"] == "1"
import hfprune_fast.kernels  # noqa: F401

del os.environ["TRITON_INTERPRET"]

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama, save_tokenizer
from interpreted import make_quicker
from interruption import interrupt, make_inputs
from transformers import PreTrainedModel

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.cli import main

make_quicker()


def pytest_collection_finish() -> None:
    """What is imported by now stays: whoever collects garbage need not look through it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """So does what the first training imported: each run of a Trainer collects garbage."""
    if "transformers.trainer" in sys.modules:
        freeze_again()


@cache
def freeze_again() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Note a figure that is printed after the tests, passed or not."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for each in terminalreporter.stats.values() for report in each]
    lines = [
        str(line)
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, line in getattr(report, "user_properties", [])
        if name == "measured"
    ]
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a network, also where there is one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another take long over tiny products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Save a model with the shipped tokenizer: save_checkpoint(model, name="model")."""

    def save(model: PreTrainedModel, name: str = "model", **kwargs: Any) -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, **kwargs)
        save_tokenizer(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def one_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llama_dir` is a copy of; nothing writes to it."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    random_llama().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def llama_dir(one_llama_dir: Path, tmp_path: Path) -> Path:
    """A random fp32 Llama of 3 layers x 96 neurons with the shipped tokenizer."""
    return shutil.copytree(one_llama_dir, tmp_path / "model")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A few thousand tokens of text."""
    path = tmp_path / "text.txt"
    path.write_text((TINY_MODEL / "calibration.txt").read_text(encoding="utf-8")[:20_000])
    return path


@dataclass(frozen=True)
class Run:
    """What a command line did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def hfprune(capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run a command line in this process: hfprune("plan", folder, "--prune-ratio", 0.2)."""

    def run(*args: Any) -> Run:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Run(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def _inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture
def small_inputs(_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of `interruption` in the current folder, where outputs go too."""
    for path in _inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def interrupted(hfprune: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run a command line that is interrupted in its fifth pass: interrupted("score", ...)."""

    def run(*args: Any, at_pass: int = 4, how: int = signal.SIGINT) -> Run:
        with monkeypatch.context() as patch:
            interrupt(patch, at_pass, how)
            done = hfprune(*args)
        assert done.code == 128 + how, done.err
        return done

    return run
