"""One run of scoring: plan, passes, saved state, sums over processes, table."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune_fast._version import __version__
from hfprune_fast.checkpoint.loading import Blueprint
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import RunOptions, ScoringOptions
from hfprune_fast.console import say, token_bar
from hfprune_fast.data.batches import TokenData
from hfprune_fast.engine.distributed import Processes
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.plan import Plan
from hfprune_fast.engine.planner import plan_run
from hfprune_fast.errors import ArgumentError, shown
from hfprune_fast.kernels import TRITON_VERSION, TaylorStatistics, slow_on_this_cpu
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.costs import own_outputs, removal_costs
from hfprune_fast.scoring.criteria import CRITERIA
from hfprune_fast.scoring.resume import ResumeFile
from hfprune_fast.scoring.run import backend_for, score_batches
from hfprune_fast.scoring.sums import PassOptions, empty_accumulator
from hfprune_fast.scoring.table import ImportanceTable


@dataclass(frozen=True)
class ScoringJob:
    """One run of scoring: what is scored, on which data and by what."""

    subject: Blueprint | ResidentModel
    spec: ModelSpec
    data: TokenData
    criteria: tuple[str, ...]
    obs: bool
    options: ScoringOptions
    seed: int  # of the tokens that fisher draws
    processes: Processes

    @property
    def _gradients(self) -> tuple[str, ...]:
        """The criteria that need a gradient."""
        return tuple(name for name in self.criteria if CRITERIA[name].head_loss is not None)

    @property
    def _draws(self) -> bool:
        """Whether the scores depend on the seed."""
        return any(CRITERIA[name].draws for name in self.criteria)

    @property
    def _source(self) -> ModelSource | None:
        return None if isinstance(self.subject, ResidentModel) else self.subject.source

    @property
    def backend(self) -> str:
        """Which kernels score."""
        like = torch.empty(0, device=self.subject.device, dtype=self.subject.dtype)
        return backend_for(like, self.options.backend, self.options.parity)

    def plan(
        self, run: RunOptions, state_file: str | Path | None, *, refit: str = "none"
    ) -> tuple[Plan, ResumeFile]:
        """Plan the run, as an interrupted one was planned, and prepare the file that saves it.

        `refit` is how the same model is refitted afterwards, as `Recipe` has it.
        """
        if self.options.parity and self.spec.experts:
            raise ArgumentError("parity rounds as the paper's code does, which knows no experts")
        file = None if state_file is None or self.processes.count > 1 else Path(state_file)
        resume_file = ResumeFile(file, self.options.save_seconds)
        # A resumed run keeps the batch size and logits budget that it began with.
        saved = resume_file.saved_identity() if self.options.resume else {}

        def plan_for(batch_size: int | None) -> Plan:
            data, subject = self.data, self.subject
            return plan_run(
                self.spec, replace(run, batch_size=batch_size),
                device=subject.device, dtype=subject.dtype, loaded=self._source is None,
                seq_len=data.longest, sequences=data.sequences, largest=data.largest,
                parity=self.options.parity, criteria=max(1, len(self._gradients)),
                refit="linear" if self.obs and refit == "none" else refit,
            )  # fmt: skip

        plan = plan_for(run.batch_size or saved.get("batch_size"))
        agreed = self.processes.as_the_first(plan.batch_size)  # with less memory free, perhaps
        if agreed != plan.batch_size:
            plan = plan_for(agreed)
        logits = saved.get("logits_budget_bytes", plan.logits_budget_bytes)
        plan = replace(plan, logits_budget_bytes=logits)
        resume_file.identity = self._identity(plan, run.attention)
        return plan, resume_file

    def _identity(self, plan: Plan, attention: str) -> dict[str, Any]:
        """Return what distinguishes this run from others."""
        batches, versions = self.data.split(plan.batch_size), _versions()
        return {
            "model_fingerprint": self._source.fingerprint if self._source else None,
            "samples": self.data.sequences,
            "seq_len": max(batch.ids.shape[1] for batch in batches),
            "criteria": list(self._gradients),
            "obs": self.obs,
            "seed": self.seed if self._draws else self.data.description.get("seed"),
            "data_sha256": self.data.sha256,
            "batch_size": plan.batch_size,
            "logits_budget_bytes": plan.logits_budget_bytes,
            "batches": hashlib.sha256(str([len(b.ids) for b in batches]).encode()).hexdigest()[:8],
            "dtype": str(self.subject.dtype).removeprefix("torch."),
            "backend": self.backend,
            "parity": self.options.parity,
            **({} if attention == "auto" else {"attention": attention}),
            **{name: versions[name] for name in ("torch", "hfprune_fast")},
        }

    def run(
        self, model: ResidentModel, plan: Plan, resume_file: ResumeFile, progress: bool
    ) -> tuple[ImportanceTable, dict[int, Tensor]]:
        """Score the model, which is entered.

        Returns:
            The table, and in the first process, with `obs`, of each layer's own MLP the covariance
            (D, D) of the gradients at its output.
        """
        if progress:
            say(f"scoring with {plan}")
            if self.subject.device.type == "cpu" and slow_on_this_cpu(self.subject.dtype):
                name = resume_file.identity["dtype"]
                say(
                    f"this CPU multiplies {name} many times slower than float32: use "
                    "--dtype float32, or model.float() for a model in memory"
                )
        batches = self.data.split(plan.batch_size)
        options = PassOptions(
            backend=self.backend, criteria=self._gradients, output_fisher=self.obs,
            seed=self.seed, parity=self.options.parity,
            recompute=plan.recompute, inputs_on_host=plan.inputs_on_host,
            pass_tokens=plan.pass_tokens, logits_budget_bytes=plan.logits_budget_bytes,
        )  # fmt: skip
        with resume_file.saved_if_interrupted(self.data.sequences):
            total, max_batch_size = empty_accumulator(model, options), plan.batch_size
            if self.options.resume:
                lengths = [length for batch in batches for length in batch.lengths]
                saved = resume_file.resume(total, lengths)
                total, max_batch_size = saved or (total, max_batch_size)
            else:
                resume_file.discard()
            share = self.processes.deal(batches)
            remaining = sum(batch.tokens for batch in share) - total.tokens
            with token_bar("scoring", remaining, progress, self.spec.flops_per_token) as report:
                total = score_batches(
                    model, share, options, total, max_batch_size=max_batch_size,
                    on_commit=resume_file.on_commit, on_progress=report,
                )  # fmt: skip
        total = _sum(total, self.processes)
        if (total.samples, total.tokens) != (self.data.sequences, self.data.tokens):
            raise RuntimeError("the processes scored another number of sequences than there are")
        table, of_mlps = self._table(total, resume_file.identity), dict[int, Tensor]()
        if self.processes.rank == 0 and total.output_fisher is not None:
            fisher = total.output_fisher.div_(self.data.tokens)
            with token_bar("removal costs", self.data.tokens, progress) as report:
                costs = removal_costs(model, batches, fisher, report)
            table = replace(table, statistics={**table.statistics, "obs": costs})
            of_mlps = own_outputs(model.parts, fisher)
        return table, of_mlps

    def _table(self, total: ScoreAccumulator, identity: Mapping[str, Any]) -> ImportanceTable:
        copied = ("dtype", "backend", "parity", "batch_size", "samples", "attention")
        provenance: dict[str, Any] = {
            "criteria": list(self.criteria),
            "versions": _versions(),
            **({"seed": self.seed} if self._draws else {}),
            "calibration": {**self.data.description, "data_sha256": self.data.sha256},
            **{key: identity[key] for key in copied if key in identity},
            "tokens": self.data.tokens,
        }
        if self._source is not None:
            provenance["model"] = self._source.name
            provenance["model_fingerprint"] = self._source.fingerprint
        statistics: dict[str, Tensor] = {}
        of_criteria = [TaylorStatistics(*each) for each in total.statistics.double().cpu()]
        for c, name in enumerate(self._gradients):
            own = of_criteria[c]._asdict()
            del own["act"]  # the same for all criteria
            statistics |= {f"{name}.{statistic}": values for statistic, values in own.items()}
            provenance[CRITERIA[name].loss_name] = total.loss_nats[c] / self.data.sequences
        statistics |= {"act": of_criteria[0].act, "down_norm": total.down_norm.cpu()}
        if total.experts is not None:
            norms, tokens, mass, *taylor = total.experts.cpu()
            statistics |= {"expert_count": tokens, "expert_mass": mass}
            statistics["expert_reap"] = norms / tokens.clamp(min=1)
            for name, terms in zip(self._gradients, taylor, strict=True):
                statistics[f"{name}.expert_taylor"] = terms
        return ImportanceTable(statistics, self.spec, provenance)


def check_criteria(
    criteria: Sequence[str],
    obs: bool,
    scoring: ScoringOptions,
    processes: Processes,
) -> None:
    """Refuse criteria and options that do not go together."""
    if not all(isinstance(name, str) for name in criteria):
        raise ArgumentError(f"criterion must be text, or several, got {shown(criteria)}")
    several, got = processes.count > 1, f"got {', '.join(criteria) or 'none'}"
    if not criteria or len(set(criteria)) != len(criteria) or not set(criteria) <= set(CRITERIA):
        raise ArgumentError(f"criterion must be one of {', '.join(CRITERIA)}, {got}")
    if obs and "fisher" not in criteria:
        raise ArgumentError(f"obs needs criterion fisher, {got}")
    if scoring.parity and list(criteria) != ["entropy"]:
        raise ArgumentError(
            f"parity rounds as the paper's code does, which knows criterion entropy alone, {got}"
        )
    if scoring.resume and several:
        raise ArgumentError("--resume is for one process; several save no state")
    if scoring.parity and several:
        raise ArgumentError("--parity is for one process, in which the paper's code adds up")


def _sum(total: ScoreAccumulator, processes: Processes) -> ScoreAccumulator:
    """Return the sums of all processes, from one all-reduce."""
    if processes.count == 1:
        return total
    norms = total.down_norm if processes.rank == 0 else torch.zeros_like(total.down_norm)
    numbers = [total.samples, total.tokens, *total.loss_nats]
    counted = torch.tensor(numbers, dtype=torch.float64, device=norms.device)
    parts = [total.statistics.double(), norms, counted]
    parts += [] if total.experts is None else [total.experts]
    flat = torch.cat([part.flatten() for part in parts])
    processes.add(flat)
    pieces = flat.split([part.numel() for part in parts])
    statistics, norms, counted, *experts = map(Tensor.view_as, pieces, parts)
    if total.output_fisher is not None:
        for output in total.output_fisher:  # which may be on the CPU
            on_device = output.to(norms.device)
            processes.add(on_device)
            output.copy_(on_device)
    samples, tokens, *losses = counted.tolist()
    return ScoreAccumulator(
        statistics, norms, total.output_fisher, experts[0] if experts else None,
        round(samples), round(tokens), tuple(losses),
    )  # fmt: skip


def _versions() -> dict[str, str | None]:
    import transformers

    return {
        "hfprune_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": TRITON_VERSION,
        "python": platform.python_version(),
    }
