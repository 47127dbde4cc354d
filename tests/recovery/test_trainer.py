"""What we take of transformers' Trainer is there."""

import inspect
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

from hfprune_fast.recovery.trainer import RecoveryTrainer


@pytest.mark.parametrize("name", ["_save", "_load_from_checkpoint", "_load_best_model"])
def test_what_is_overridden_of_trainer_is_there(name: str) -> None:
    """Else a release that renames it would save and load the whole model, or nothing."""
    own, theirs = (inspect.signature(getattr(c, name)) for c in (RecoveryTrainer, Trainer))
    assert len(own.parameters) == len(theirs.parameters)


def test_no_other_private_name_of_trainer_is_taken() -> None:
    ours = {name for name in vars(RecoveryTrainer) if name.startswith("_") and name[1] != "_"}
    assert {name for name in ours if hasattr(Trainer, name)} == {
        "_save", "_load_from_checkpoint", "_load_best_model",
    }  # fmt: skip


def test_the_count_of_gpus_of_trainer_is_settable(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = arguments.n_gpu + 1
    assert arguments.n_gpu == arguments._n_gpu
