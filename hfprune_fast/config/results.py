"""What is written, drawn and trained after the choice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hfprune_fast.errors import ArgumentError
from hfprune_fast.options import LARGEST_COUNT, Options, option

LAYOUTS = ("auto", "custom", "native", "padded", "decilm")
EXPORTS = ("custom", "padded", "decilm", "gguf")
TRAINED = ("all", "mlp")
RECOVERY_LOSSES = ("kl", "ce", "kl+ce")
TEACHERS = ("cached", "resident")


@dataclass(frozen=True)
class OutputOptions(Options):
    """How a pruned checkpoint is written."""

    layout: str = option(
        "auto",
        "How layers of different widths are written: custom (which auto is) needs this package or "
        "remote code to load, padded loads everywhere and is larger, decilm is for vLLM, native "
        "needs a transformers that builds the family by per_layer_config.",
        choices=LAYOUTS,
    )
    max_shard_size: str | int | None = option(
        None, "Such as 5GB. [default: shards are kept]", metavar="SIZE"
    )
    verify: bool = option(False, "Read the output back from disk and compare it.")
    force: bool = option(False, "Replace an earlier output.")


@dataclass(frozen=True)
class ReportOptions(Options):
    """What is measured and drawn when a pruned checkpoint is written."""

    text: str | None = option(
        None,
        "Held-out text to measure the result on, all of it, for the model card and the report.",
        metavar="SOURCE",
    )
    report: str | None = option(
        None, "Write a page (HTML) with pictures of the result and the run.", metavar="FILE"
    )

    def __post_init__(self) -> None:
        for name in ("text", "report"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        super().__post_init__()


@dataclass(frozen=True)
class RecoveryOptions(Options):
    """How a pruned model is trained to give the dense model's output."""

    tokens: int = option(
        500_000, "Tokens to train on; a shorter text is passed over several times.", least=1,
        most=2**53,
    )  # fmt: skip
    lora: int = option(
        16,
        "Rank of the LoRA adapters; 0 trains the weights themselves.",
        least=0,
        most=LARGEST_COUNT,
    )
    train: str = option(
        "all", "What is trained of each layer: all of its linear layers, or those of MLPs.",
        choices=TRAINED,
    )  # fmt: skip
    loss: str = option(
        "kl",
        "kl: KL from the dense model; ce: cross entropy of the text; kl+ce: their sum. The weights "
        "whose loss on held-out samples is lowest are kept.",
        choices=RECOVERY_LOSSES,
    )  # fmt: skip
    teacher: str = option(
        "cached",
        "cached: the dense model runs first, and its final hidden states are kept in a file; "
        "resident: both models are in memory.",
        choices=TEACHERS,
    )
    cache: str | None = option(
        None,
        "Keep the dense model's hidden states in this file, for other runs over the same windows. "
        "[default: beside --out, until the run ends]",
        metavar="FILE",
    )
    batch_tokens: int = option(
        2048, "Tokens of a step, at least one sample.", least=1, most=LARGEST_COUNT
    )
    learning_rate: float | None = option(
        None,
        "The largest, after the warm-up; it decays to 0 on a cosine. [default: 0.4 / hidden size; "
        "0.1 / hidden size with --lora 0]",
        least=0,
        most=1e30,  # inf is no number of a record
    )
    held_out: int = option(
        16, "Samples that KL is measured on; of a short text at most a tenth.", least=1,
        most=LARGEST_COUNT,
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, a third more time."
    )
    adapter: bool = option(False, "Write the LoRA adapters, for peft, and not a whole model.")
    resume: bool = option(False, "Continue a recovery that was interrupted.")

    def __post_init__(self) -> None:
        if isinstance(self.cache, os.PathLike):
            object.__setattr__(self, "cache", os.fspath(self.cache))
        super().__post_init__()
        if self.adapter and self.lora == 0:
            raise ArgumentError("adapter needs lora 1 or more; lora 0 trains the weights")
        if self.cache is not None and self.teacher != "cached":
            raise ArgumentError("cache is for teacher cached; a resident one needs no file")

    @property
    def trains_on_dense(self) -> bool:
        """Whether the loss compares with the dense model; the held-out KL always does."""
        return "kl" in self.loss
