"""What is said and kept of a recovery that ends early, by what ended it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hfprune_fast.engine.distributed import Processes
from hfprune_fast.errors import MemoryShortageError, NumericsError, ResumeError
from hfprune_fast.recovery.work import WorkFolder, check_work


def ended_by(error: BaseException, folder: Path, rank: int = 0, holds: str = "") -> WorkFolder:
    """End a run whose folder holds a checkpoint, or states of so many windows."""
    work = WorkFolder(folder / "out", {"recovery": 1})
    work.begin(resume=False)
    if holds.startswith("checkpoint"):
        (work.path / holds).mkdir()
    elif holds:
        save_file({"done": torch.tensor([int(holds)])}, work.teacher)
    with pytest.raises(type(error)), work.kept_if_interrupted(Processes(rank, rank + 1)):
        raise error
    return work


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(), SystemExit(143), OSError("no space left"), MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"), MemoryShortageError("memory ran out"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_interruption_is_resumed(error: BaseException, tmp_path: Path, capfd: Any) -> None:
    work = ended_by(error, tmp_path)
    assert f"is in {work.path}; the same command with --resume" in capfd.readouterr().err
    check_work(tmp_path / "out", resume=True, force=False)
    with pytest.raises(ResumeError, match="an interrupted run has left"):
        check_work(tmp_path / "out", resume=False, force=False)


def test_a_corrected_command_is_not_refused(tmp_path: Path, capfd: Any) -> None:
    work = ended_by(NumericsError("use --dtype float32"), tmp_path, holds="0")
    assert capfd.readouterr().err == ""
    assert not work.path.exists()
    check_work(tmp_path / "out", resume=False, force=False)


@pytest.mark.parametrize(("rank", "holds"), [(0, "checkpoint-2"), (0, "3"), (1, "")])
def test_work_is_kept_after_an_error(tmp_path: Path, capfd: Any, rank: int, holds: str) -> None:
    assert ended_by(NumericsError("damaged"), tmp_path, rank, holds).path.is_dir()
    assert capfd.readouterr().err == ""
