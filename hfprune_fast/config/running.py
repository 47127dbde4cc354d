"""How models and texts are run, whatever is done with them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from hfprune_fast.errors import ArgumentError
from hfprune_fast.kernels import BACKENDS
from hfprune_fast.options import LARGEST_COUNT, Options, option

OFFLOADS = ("auto", "none", "cpu", "disk")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")

DEFAULT_SEQ_LEN = 1024
DEFAULT_SAMPLES = 128
# Calibration tokens for each neuron of a layer. With n for each kept neuron, KL after a refit is
# about 1 + 5 / n times that with much more text (docs/evidence.md): here 1.1 times.
REFIT_TOKENS = 32


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """Which windows of a text are used."""

    samples: int | None = option(
        DEFAULT_SAMPLES,
        "Samples to draw; None, the default of evaluate and report, takes the whole text in order.",
        least=1,
        most=LARGEST_COUNT,
    )
    seq_len: int | None = option(
        None, f"Tokens per sample. [default: {DEFAULT_SEQ_LEN}, or the model's longest if less]",
        least=1, most=LARGEST_COUNT,
    )  # fmt: skip
    seed: int = option(
        0, "Which samples are drawn, and which tokens criterion fisher draws.",
        least=0, most=2**63 - 1,
    )  # fmt: skip
    text_field: str | None = option(
        None, "The field of records to read. [default: text, messages or conversations]"
    )
    chat_template: bool = option(
        False, "Read chats by the tokenizer's chat template, not as plain text."
    )


@dataclass(frozen=True)
class PruningCalibration(CalibrationOptions):
    """The same for a pruning, which draws more windows by default where a refit needs them."""

    samples: int | None = option(
        None,
        f"Samples to draw. [default: {DEFAULT_SAMPLES}, or with a refit as many as hold "
        f"{REFIT_TOKENS} tokens for each neuron of a layer]",
        least=1,
        most=LARGEST_COUNT,
    )

    def drawn(self, seq_len: int, neurons: int) -> int:
        """Return how many windows of `seq_len` tokens to draw.

        Args:
            neurons: of each layer that is refitted; 0 where none is.
        """
        return self.samples or max(DEFAULT_SAMPLES, math.ceil(REFIT_TOKENS * neurons / seq_len))


@dataclass(frozen=True)
class RunOptions(Options):
    """Where a model runs, and in how much memory."""

    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one.")
    dtype: str = option(
        "auto",
        "Dtype to run in; auto is the checkpoint's own, but float32 on a CPU that is slow in it.",
        choices=DTYPES,
    )
    attention: str = option(
        "auto", "How attention runs; auto is sdpa where the family has it.", choices=ATTENTIONS
    )
    batch_size: int | None = option(
        None,
        "Samples at once. [default: what suits the device and fits]",
        least=1,
        most=LARGEST_COUNT,
    )
    offload: str = option(
        "auto",
        "Where weights are: none keeps them on the device; cpu, in host memory, and disk, in the "
        "checkpoint, fetch them layer by layer; auto keeps them on the device if they fit.",
        choices=OFFLOADS,
    )
    memory_budget: str | int | None = option(
        None, "Memory to use, such as 24GiB. [default: all that is free]", metavar="SIZE"
    )

    def __post_init__(self) -> None:
        if type(self.device).__name__ == "device":  # torch's own
            object.__setattr__(self, "device", str(self.device))
        super().__post_init__()


@dataclass(frozen=True)
class ScoringOptions(Options):
    """How neurons are scored, whatever they are scored by."""

    backend: str | None = option(
        None,
        "Kernels to score with. [default: HFPRUNE_BACKEND, else triton on a GPU and cpp on a CPU]",
        choices=BACKENDS,
    )
    parity: bool = option(False, "Round products and sums as the paper's code does.")
    resume: bool = option(False, "Continue scoring that was interrupted.")
    save_seconds: float = option(
        60.0, "How often the scores so far are saved, for resume.", least=0
    )


@dataclass(frozen=True)
class TaskOptions(Options):
    """Which tasks of lm-evaluation-harness are run, and on how much of them."""

    tasks: str | None = option(
        None,
        "Tasks of lm-evaluation-harness, such as hellaswag,piqa; paper: the paper's and wikitext.",
        metavar="NAMES",
    )
    include_path: str | None = option(None, "Folder of your own task files.", metavar="DIR")
    limit: int | None = option(
        None, "Documents of each task. [default: all]", least=1, most=LARGEST_COUNT
    )
    num_fewshot: int | None = option(
        None, "Examples before each question. [default: the task's own]", least=0, most=1000
    )

    def __post_init__(self) -> None:
        if isinstance(self.include_path, os.PathLike):
            object.__setattr__(self, "include_path", os.fspath(self.include_path))
        super().__post_init__()
        if self.tasks is None:
            for name in ("include_path", "limit", "num_fewshot"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name} is for tasks, and no tasks are given")
