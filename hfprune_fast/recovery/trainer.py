"""transformers' Trainer with our loss, our order of windows, held-out KL and our progress."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hfprune_fast.console import say, token_bar
from hfprune_fast.errors import NumericsError, OutputError, one_line
from hfprune_fast.recovery.data import RecoveryData
from hfprune_fast.recovery.setup import Setup
from hfprune_fast.recovery.student import Student

_CHECKS = 10  # of the held-out KL in a run, each with a checkpoint
_WARMUP_PART = 0.05
_WEIGHTS = "model.safetensors"
_JUDGED_BY = "eval_loss"  # of Trainer's metrics

Batch = Callable[[Sequence[int]], dict[str, Tensor]]  # of windows, by their numbers


@dataclass(frozen=True)
class Outcome:
    """What a training did; KL is on the held-out windows, in nats."""

    kl_before: float
    kl_after: float  # of the best weights, by the loss; of the start's where none had a lower one
    steps: int  # done, fewer than planned where it diverged
    best_step: int  # 0 where nothing was better than the start
    losses: list[tuple[int, float]]  # after so many steps, the mean since the last
    held_out: list[tuple[int, float]]

    def record(self) -> dict[str, Any]:
        """Return what is recorded of it."""
        names = ("kl_before", "kl_after", "steps", "best_step")
        return {name: getattr(self, name) for name in names}


class RecoveryTrainer(Trainer):
    """The loop; of the model it saves and loads only what is trained."""

    def __init__(self, data: RecoveryData, batch: Batch, **options: Any) -> None:
        super().__init__(
            train_dataset=data.order,
            eval_dataset=data.held_out,
            data_collator=batch,
            **options,
        )
        self._held_out, self._batch = data.held_out, batch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return KL and loss on the held-out windows, as Trainer's metrics are; stop at NaN."""
        kl, loss = self.held_out()
        metrics = {"eval_kl": kl, _JUDGED_BY: loss}
        if loss == math.inf:
            say(
                f"the held-out loss is NaN or inf after step {self.state.global_step}, and "
                "training stops there; a smaller --learning-rate may be better"
            )
            self.control.should_training_stop = True
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def held_out(self) -> tuple[float, float]:
        """Return the mean KL and loss on the held-out windows, dealt to the processes; inf for NaN.

        They are in nats.
        """
        student, device = self._student, self.args.device
        numbers = self._held_out[self.args.process_index :: self.args.world_size]
        at_once = self.args.per_device_train_batch_size
        sums = torch.zeros(3, dtype=torch.float64)
        was_training = student.training
        student.eval()
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            batch = {name: part.to(device) for name, part in self._batch(some).items()}
            with self.accelerator.autocast():
                means = student.held_out(**batch)
            found = [*(float(mean) * len(some) for mean in means), len(some)]
            sums += torch.tensor(found, dtype=torch.float64)
        student.train(was_training)
        *totals, windows = self.accelerator.reduce(sums.to(device), "sum").tolist()
        kl, loss = (t / windows if math.isfinite(t) else math.inf for t in totals)
        return kl, loss

    @property
    def _student(self) -> Student:
        student: Student = self.accelerator.unwrap_model(self.model)
        return student

    def _trained(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self._student.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.cpu().contiguous() for n, p in self._trained().items()}, folder / _WEIGHTS)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(checkpoint) / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(stored[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class _Progress(TrainerCallback):
    """Feeds a bar, whose notes are the latest loss and held-out KL."""

    def __init__(
        self, on_progress: Callable[[float], None], notes: dict[str, str], step_tokens: int
    ) -> None:
        self._on_progress, self._notes, self._tokens = on_progress, notes, step_tokens
        self._done = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        steps, self._done = state.global_step - self._done, state.global_step
        self._on_progress(steps * self._tokens)
        if state.global_step == state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for key, name in (("loss", "loss"), ("eval_kl", "held-out KL")):
            if key in (logs or {}):
                self._notes[name] = f"{logs[key]:.4f}"


def train(
    student: Student,
    data: RecoveryData,
    batch: Batch,
    setup: Setup,
    work: Path,
    progress: bool,
) -> Outcome:
    """Train a student; it has the best weights at the end.

    Args:
        batch: returns what the student takes of windows.
        work: the folder of the run's checkpoints; the last whole one there is continued from.
    """
    trainer = RecoveryTrainer(data, batch, model=student, args=_arguments(data, setup, work))
    trainer.remove_callback(PrinterCallback)
    kl_before, loss_before = trainer.held_out()
    if math.inf in (kl_before, loss_before):
        raise NumericsError(
            "the held-out loss is NaN or inf before any training: one of the models is damaged, or "
            "needs --dtype float32"
        )
    notes = {"held-out KL": f"{kl_before:.4f}"}
    last = _last_checkpoint(work)
    if last is not None:
        say(f"continuing after {last.name.removeprefix('checkpoint-')} of {data.steps} steps")
    with token_bar("recovering", data.tokens, progress, notes=notes) as on_progress:
        step_tokens = data.step_windows * data.window_tokens
        trainer.add_callback(_Progress(on_progress, notes, step_tokens))
        with _quiet(), _written_to(work):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    is_better = state.best_metric is not None and state.best_metric < loss_before
    best_step = int(state.best_global_step or 0) if is_better else 0
    held_out = _curve(state.log_history, "eval_kl")
    return Outcome(
        kl_before=kl_before,
        kl_after=dict(held_out).get(best_step, kl_before),
        steps=state.global_step,
        best_step=best_step,
        losses=_curve(state.log_history, "loss"),
        held_out=held_out,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log line about how transformers orders checkpoints, which breaks the bar."""
    logger = logging.getLogger("transformers.trainer_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _written_to(work: Path) -> Iterator[None]:
    """Name the folder where a checkpoint cannot be written, as on a full disk."""
    try:
        yield
    except (
        SafetensorError,
        RuntimeError,
    ) as error:  # torch's writer of zip files raises the second
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        message = f"no checkpoint can be written to {work} ({one_line(error)}); make room there"
        raise OutputError(message) from None


def _curve(history: list[dict[str, float]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of what was logged, as JSON can hold it: without NaN and inf."""
    found = ((int(entry["step"]), entry[key]) for entry in history if key in entry)
    return [(step, value) for step, value in found if math.isfinite(value)]


def _arguments(data: RecoveryData, setup: Setup, work: Path) -> TrainingArguments:
    steps = -(-data.steps // _CHECKS)
    at_once = setup.batch_size * setup.processes.count
    on_cpu = setup.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=data.steps,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=setup.batch_size,
        gradient_accumulation_steps=data.step_windows // at_once,
        learning_rate=setup.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(_WARMUP_PART * data.steps),  # the first of which changes nothing
        weight_decay=0.0,  # else a long run would shrink what is good as it is
        bf16=setup.dtype == torch.bfloat16,
        use_cpu=on_cpu,
        seed=setup.seed % 2**32,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=steps,
        save_total_limit=1,  # the best beside it
        load_best_model_at_end=True,
        metric_for_best_model=_JUDGED_BY,
        greater_is_better=False,
        logging_steps=steps,
        logging_nan_inf_filter=False,  # else the mean of what came before would be shown
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process for each GPU, or one GPU
    return arguments


def _last_checkpoint(work: Path) -> Path | None:
    """Return the latest complete checkpoint; say which are not complete."""
    found = []
    for folder in work.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdecimal() and _is_whole(folder, int(number)):
            found.append((int(number), folder))
        else:
            say(f"{folder} is incomplete and is ignored")
    return max(found)[1] if found else None


def _is_whole(folder: Path, step: int) -> bool:
    """Return whether a checkpoint holds all that a run continues from."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(folder / _WEIGHTS, framework="pt"):  # which compares sizes
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    # torch's files are zip files, whose end says what is in them.
    torchs = [folder / "optimizer.pt", folder / "scheduler.pt", *folder.glob("rng_state*.pth")]
    return state.get("global_step") == step and len(torchs) > 2 and all(map(is_zipfile, torchs))
