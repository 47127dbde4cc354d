"""From a model and text to the table of scores: planned, run, kept safe on the way, added up."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hfprune_fast._version import __version__
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint import source as checkpoints
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.batches import MicroBatch, as_batches, micro_batch, numbered
from hfprune_fast.data.calibration import windows_for
from hfprune_fast.engine import distributed as processes
from hfprune_fast.engine import planner
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.streaming import running
from hfprune_fast.errors import ArgumentError, CalibrationError
from hfprune_fast.kernels import TRITON_VERSION, TaylorStatistics
from hfprune_fast.models import spec
from hfprune_fast.scoring import criteria
from hfprune_fast.scoring.costs import removal_costs
from hfprune_fast.scoring.passes import How, no_totals
from hfprune_fast.scoring.resume import Keeper, Totals
from hfprune_fast.scoring.run import backend_for, score_batches
from hfprune_fast.scoring.table import ImportanceTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SAMPLES = 128
SAVE_SECONDS = 60.0
CRITERIA = (*criteria.CRITERIA, "activation")
# What the mean of the sequences' losses is.
LOSS_NAMES = {
    "entropy": "entropy_nats",
    "cross_entropy": "cross_entropy_nats",
    "fisher": "sampled_cross_entropy_nats",
}


def score(
    model_or_path: PreTrainedModel | str | Path,
    batches_or_source: Iterable[Any] | Tensor | NDArray[Any] | str | Path,
    *,
    criterion: str | Sequence[str] = "entropy",
    obs: bool = False,
    samples: int | None = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
    parity: bool = False,
    offload: str = "auto",
    memory_budget: str | None = None,
    state_file: str | Path | None = None,
    resume: bool = False,
    save_seconds: float = SAVE_SECONDS,
    distributed: bool = False,
    progress: bool = False,
) -> ImportanceTable:
    """Score every MLP neuron of a model, by default by the paper's criterion.

    Args:
        model_or_path: a loaded causal language model, or a folder, hub name or `demo`.
        batches_or_source: token batches: (B, T) integers each, or mappings with such `input_ids`
            and an `attention_mask` of padding on one side; or one (N, T) tensor or array; or, for a
            model given by path, a calibration source as `calibration.token_windows` takes it.
        criterion: one or several of CRITERIA, which share the forward: "entropy" of the model's
            output (arXiv 2603.08083), "cross_entropy" of the next token, "fisher" (of a token that
            is drawn from the output), or "activation", forward only; see `scoring`.
        obs: also what each neuron's removal costs when the others are refitted (`obs.py`), which
            takes criterion "fisher", another forward and O(F³) a layer.
        samples: sequences drawn from a source.
        seq_len: tokens a sequence; 1024, or the model's longest if that is less.
        seed: which documents and windows are drawn from a source, and fisher's tokens.
        batch_size: sequences that run at once; by default as many as suit the device and fit. The
            scores do not depend on it but for rounding.
        device, dtype: where and in what a model given by path runs, see `loading.blueprint`.
        backend: "triton" or "torch"; by default what HFPRUNE_BACKEND says, else triton on a GPU and
            torch elsewhere.
        parity: round products and totals to the model's dtype, one sequence at a time, as the
            paper's code does: only for reproducing it, since bfloat16 totals lose most of their
            digits.
        offload: where the weights of a model given by path are: "none", on the device; "cpu", in
            host memory, and "disk", in the checkpoint, from where they are brought layer by layer;
            "auto", on the device if they fit. On a CPU it changes no bit of the scores,
            unless so little memory is left that the head's chunks differ.
        memory_budget: such as "24GiB": what may be used on the device, instead of all that is free.
        state_file: keep what has been added up so far in this file, every `save_seconds` (after
            each pass if 0) and when interrupted. The caller deletes it when the table is safe.
        resume: go on from `state_file`, if it exists.
        distributed: torchrun started this program, and every process calls this function with the
            same arguments: each does its share, and the table in each is that of all.
        progress: show a bar on stderr.

    Returns:
        The table of all statistics, (L, F) float64 each, from which any ratio can be selected.

    Raises:
        HFPruneError: bad input, one line; its subclasses say which kind.
    """
    criteria = (criterion,) if isinstance(criterion, str) else tuple(criterion)
    gradients = _check_criteria(criteria, obs, parity)
    together = processes.launched() if distributed else processes.Processes()
    if resume and together.count > 1:
        raise ArgumentError("--resume is for one process; several keep no state to go on from")
    if parity and together.count > 1:
        raise ArgumentError("--parity is for one process, in which the paper's code adds up")
    if resume and state_file is None:
        raise ArgumentError("resume needs the state_file to go on from, got none")
    provenance: dict[str, Any] = {"criteria": list(criteria), "versions": _versions()}
    if "fisher" in gradients:
        provenance["seed"] = seed
    calibration: dict[str, Any] = {"source": "token batches"}
    source = batches_or_source
    subject: loading.Blueprint | ResidentModel
    if isinstance(model_or_path, str | Path):
        device = processes.own_device(device, together)
        # Refused now rather than after minutes of reading; float32 stands for what will be loaded.
        backend_for(torch.empty(0, device=loading.torch_device(device)), backend, parity)
        folder = checkpoints.find_model(model_or_path)
        provenance["model"] = checkpoints.display_name(model_or_path)
        provenance["model_fingerprint"] = checkpoints.fingerprint(folder)
        if isinstance(source, str | Path):
            calibration = {"source": checkpoints.display_name(source), "seed": seed}
            source = windows_for(folder, source, seq_len, samples, seed)
            calibration["seq_len"] = source.shape[1]
        subject = loading.blueprint(folder, dtype=dtype, device=device)
        size = subject.checkpoint.size
    else:
        _check_asked_of_a_loaded_model(device, dtype, source, state_file)
        subject = ResidentModel(model_or_path)
        size = spec.size_of(model_or_path)
    like = torch.empty(0, device=subject.device, dtype=subject.dtype)
    backend = backend_for(like, backend, parity)
    shape = planner.ModelShape.of(size, subject.model.config)
    given = numbered(micro_batch(b, shape.vocab_size) for b in as_batches(source, 1 << 62))
    if not given:
        raise CalibrationError("no token batches to score with; expected at least one sequence")
    sequences, tokens = sum(len(b.ids) for b in given), sum(b.tokens for b in given)
    keeper = Keeper(
        None if state_file is None or together.count > 1 else Path(state_file), save_seconds
    )

    def plan_for(batch_size: int | None) -> planner.Plan:
        one_tensor = isinstance(source, Tensor) or hasattr(source, "__array__")
        return planner.plan_scoring(
            shape,
            device=subject.device,
            dtype=subject.dtype,
            seq_len=max(batch.ids.shape[1] for batch in given),
            sequences=sequences,
            batch_size=batch_size,
            largest=None if one_tensor else max(len(batch.ids) for batch in given),
            offload=offload,
            memory_budget=memory_budget,
            loaded=isinstance(subject, ResidentModel),
            parity=parity,
            criteria=max(1, len(gradients)),
            fitting=obs,
        )

    with processes.joined(subject.device, together):
        # What a run began with in the memory that was free then is what it goes on with.
        kept = keeper.kept_identity() if resume else {}
        plan = plan_for(kept.get("batch_size") if batch_size is None else batch_size)
        agreed = together.as_the_first(plan.batch_size)  # with less memory free, perhaps
        plan = plan if agreed == plan.batch_size else plan_for(agreed)
        if progress:
            say(f"scoring with {plan}")
        batches = [part for batch in given for part in batch.split(plan.batch_size)]
        keeper.identity = {
            "model_fingerprint": provenance.get("model_fingerprint"),
            "samples": sequences,
            "seq_len": max(batch.ids.shape[1] for batch in batches),
            "criteria": list(gradients),
            "obs": obs,
            "seed": seed if "fisher" in gradients else calibration.get("seed"),
            "data_sha256": _digest(batches),
            "batch_size": plan.batch_size,
            "logits_budget_bytes": kept.get("logits_budget_bytes", plan.logits_budget_bytes),
            "batches": hashlib.sha256(str([len(b.ids) for b in batches]).encode()).hexdigest()[:8],
            "dtype": str(subject.dtype).removeprefix("torch."),
            "backend": backend,
            "parity": parity,
            **{name: provenance["versions"][name] for name in ("torch", "hfprune_fast")},
        }
        how = How(
            backend=backend,
            criteria=gradients,
            seed=seed,
            parity=parity,
            recompute=plan.recompute,
            inputs_on_host=plan.inputs_on_host,
            pass_tokens=plan.pass_tokens,
            logits_budget_bytes=keeper.identity["logits_budget_bytes"],
        )
        with (
            (
                subject if isinstance(subject, ResidentModel) else running(subject, plan.offload)
            ) as model,
            keeper.kept_if_interrupted(sequences),
        ):
            totals, most = no_totals(model, how, obs), plan.batch_size
            if resume:
                totals, most = keeper.resume(totals) or (totals, most)
            share = together.deal(batches)
            todo_tokens = sum(batch.tokens for batch in share) - totals.tokens
            with token_bar("scoring", todo_tokens, progress, shape.flops_per_token) as done:
                totals = score_batches(
                    model, share, how, totals, most=most, committed=keeper.committed, done=done
                )
            totals = _sum(totals, together)
            costs = None
            if obs and together.rank == 0:  # the others' part is done
                assert totals.output_fisher is not None
                fisher = totals.output_fisher / tokens
                with token_bar("removal costs", tokens, progress) as done:
                    costs = removal_costs(model, batches, fisher, done)
    assert (totals.samples, totals.tokens) == (sequences, tokens)
    told = ("dtype", "backend", "parity", "batch_size", "samples")
    provenance |= {
        "calibration": {**calibration, "data_sha256": keeper.identity["data_sha256"]},
        **{key: keeper.identity[key] for key in told},
        "tokens": tokens,
    }
    statistics: dict[str, Tensor] = {}
    of_criteria = totals.statistics.double().cpu()
    for c, name in enumerate(gradients):
        own = TaylorStatistics(*of_criteria[c].unbind())
        statistics |= {f"{name}.l1": own.l1, f"{name}.l2": own.l2, f"{name}.mask": own.fisher_mask}
        provenance[LOSS_NAMES[name]] = totals.loss_nats[c] / sequences
    statistics["act"] = TaylorStatistics(*of_criteria[0].unbind()).act
    statistics["down_norm"] = totals.down_norm.cpu()
    if costs is not None:
        statistics["obs"] = costs
    return ImportanceTable(statistics, size, provenance)


def _check_criteria(criteria: Sequence[str], obs: bool, parity: bool) -> tuple[str, ...]:
    """Return those that need a gradient."""
    if not criteria or len(set(criteria)) != len(criteria) or not set(criteria) <= set(CRITERIA):
        raise ArgumentError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {', '.join(criteria) or 'none'}"
        )
    if obs and "fisher" not in criteria:
        raise ArgumentError(f"obs needs criterion fisher, got {', '.join(criteria)}")
    if parity and list(criteria) != ["entropy"]:
        raise ArgumentError(
            f"parity rounds as the paper's code does, which knows criterion entropy alone, "
            f"got {', '.join(criteria)}"
        )
    return tuple(criterion for criterion in criteria if criterion != "activation")


def _check_asked_of_a_loaded_model(
    device: str, dtype: str, source: Any, state_file: str | Path | None
) -> None:
    if (device, dtype) != ("auto", "auto"):
        raise ArgumentError("device and dtype are those of the loaded model; move or cast it first")
    if state_file is not None:
        raise ArgumentError("state_file needs the model by path, to tell it from others")
    if isinstance(source, str | Path):
        raise ArgumentError(
            "a loaded model is scored over token batches; give the model by path to use text"
        )


def _sum(totals: Totals, together: processes.Processes) -> Totals:
    """Return the totals of all processes, from one all-reduce."""
    if together.count == 1:
        return totals
    norms = totals.down_norm if together.rank == 0 else torch.zeros_like(totals.down_norm)
    numbers = [totals.samples, totals.tokens, *totals.loss_nats]
    parts = [
        totals.statistics.double(),
        norms,
        torch.tensor(numbers, dtype=torch.float64, device=norms.device),
    ]
    flat = torch.cat([part.flatten() for part in parts])
    together.add(flat)
    statistics, norms, counted = (
        piece.view(part.shape)
        for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    )
    if totals.output_fisher is not None:
        for layer in totals.output_fisher:  # which is on the CPU
            on_device = layer.to(norms.device)
            together.add(on_device)
            layer.copy_(on_device)
    samples, tokens, *losses = counted.tolist()
    return Totals(
        statistics, norms, totals.output_fisher, round(samples), round(tokens), tuple(losses)
    )


def _digest(batches: Iterable[MicroBatch]) -> str:
    """sha256 of each sequence's length and ids, so of the data and not of its batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for ids, length in zip(batch.ids.numpy().astype("<i8"), batch.lengths, strict=True):
            digest.update(f"{length}:".encode() + ids[:length].tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str | None]:
    import transformers

    return {
        "hfprune_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": TRITON_VERSION,
        "python": platform.python_version(),
    }
