"""Plan a run for the free memory: resident or streamed, stored or recomputed, how much at once.

Sizes are counted from the model's spec, for the layers of the families in `models`, as
transformers runs them with SDPA or flash attention; s is the size of an element, w at least fp32's.
A token takes, in a layer's autograd graph:

    2·w·D   the norms' inputs, which they keep in fp32      2·s·D   residual stream
    4·s·A   q, k, v, output of attention, A = heads · head_dim (k and v are repeated to A at most)
    2·s·F   gate and up                                     2·w·A   norms of q and k, Qwen3's

where F is the neurons that a token meets: of k chosen experts, and of the layer's own MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hfprune_fast.config import RunOptions
from hfprune_fast.console import human_bytes, parse_bytes
from hfprune_fast.engine.machine import available_bytes
from hfprune_fast.engine.plan import Plan
from hfprune_fast.errors import ArgumentError, MemoryShortageError
from hfprune_fast.kernels import LOGITS_BUDGET_BYTES, LOGITS_BUDGET_ROWS
from hfprune_fast.models.families import FAMILIES
from hfprune_fast.models.sites import table_shape
from hfprune_fast.models.spec import ModelSpec

# What a micro-batch should hold to keep the device's matrix unit busy. Layers narrower than 4096
# take up to four times as many on a GPU: their products end before the next ones are launched.
_TOKENS_AT_ONCE, _WIDE = {"cpu": 1024, "cuda": 4096}, 4096
# What a pass must hold for the work to hide the transfers of a large model's weights to a GPU.
_HIDING_TOKENS = 16384
# At most, since only whole passes are saved for a run that is resumed.
_MAX_PASS_TOKENS = {"cpu": 16384, "cuda": 65536}
_MIN_LOGITS_BYTES = 16 << 20  # for a small memory budget
# Allocators retain some freed memory, and reuse less of it where sizes vary (measured, CPU).
_STORE_SLACK, _RECOMPUTE_SLACK = 1.1, 1.25
_LIBRARIES_BYTES = 48 << 20  # work space of their own, and the head's temporaries
RECONSTRUCTED_AT_ONCE = 2048  # tokens of a step of a reconstruction
RIDGE_DIRECTIONS = 64  # of the output, in which the ridges of a refit are compared
FACTOR_TOKENS = 2048  # on which the KL of each layer alone cut is measured
_PIECE_ROWS = 128  # rows that the torch path of the Taylor pass has in fp32 and fp64


def plan_run(
    spec: ModelSpec,
    run: RunOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
    sequences: int,
    largest: int | None = None,
    loaded: bool = False,
    parity: bool = False,
    criteria: int = 1,
    refit: str = "none",
    resident_bytes: int | None = None,
) -> Plan:
    """Return the first plan that fits: stored, recomputed, streamed; large batches before small.

    Args:
        spec: the model.
        run: batch_size, offload and memory_budget; what they leave open is chosen here.
        device, dtype: where and in what it will run.
        seq_len, sequences: tokens of the longest sequence, and how many there are.
        largest: the batches are given, and this is the largest of them; it is halved to fit.
        loaded: the weights are in memory already and stay where they are.
        parity, criteria: one sequence at a time; how many criteria share the forward.
        refit: "linear" where removal costs or a refit follow, with the weights still in memory;
            "reconstruct" where the refit trains as well.
        resident_bytes: of the weights and what is as long in memory; None is the weights in dtype.

    Raises:
        ArgumentError: a memory budget that is not a size, or offload of a loaded model.
        MemoryShortageError: nothing fits the memory budget.
    """
    if loaded and run.offload in ("cpu", "disk"):
        raise ArgumentError(f"offload {run.offload} needs the model by path; this one is in memory")
    budget = run.memory_budget
    free = available_bytes(device) if budget is None else parse_bytes(budget, "memory_budget")
    estimator = MemoryEstimator(
        spec, device, dtype, seq_len, sequences, free, loaded, criteria, refit, resident_bytes
    )
    tokens_at_once = _TOKENS_AT_ONCE.get(device.type, 4096)
    if device.type != "cpu":
        tokens_at_once *= min(max(1, _WIDE // spec.hidden_size), 4)
    at_once = max(1, min(tokens_at_once // seq_len, sequences))
    max_batch_size = 1 if parity else run.batch_size or largest or at_once
    exact = run.batch_size is not None
    plans = list(estimator.plans(max_batch_size, exact=exact, offload=run.offload))
    fit = (plan for plan in plans if plan.total_bytes <= free)
    smallest = min(plans, key=lambda plan: plan.total_bytes)
    chosen = next(fit, None if budget else smallest)
    if chosen is None:
        needed = f"about {human_bytes(smallest.total_bytes)} ({smallest})"
        raise MemoryShortageError(
            f"memory budget {budget} is too small: at least {needed} is "
            "needed here; give more, or a smaller --seq-len"
        )
    return estimator.with_streams(chosen)


@dataclass
class MemoryEstimator:
    """Estimates the memory of each possible plan, see the head of this file.

    The arguments are those of `plan_run`.
    """

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    seq_len: int
    sequences: int
    free: int
    loaded: bool
    criteria: int
    refit: str
    resident_bytes: int | None = None

    def __post_init__(self) -> None:
        spec, self.s = self.spec, self.dtype.itemsize
        self.w = max(4, self.s)
        self.layers, self.hidden = spec.num_layers, spec.hidden_size
        self.width = max(
            own + spec.experts_per_token * spec.expert_width * bool(count)
            for own, count in zip(spec.widths, spec.experts or (0,) * self.layers, strict=True)
        )
        self.weights = 0 if self.loaded else spec.total_params * self.s
        if self.resident_bytes is not None:
            self.weights = self.resident_bytes
        # Sums, those that a pass makes of them, and column norms.
        neurons = math.prod(table_shape(spec.sites))
        self.tables = 2 * (4 * self.criteria + 1) * neurons * 8
        self.refit_bytes = 0
        if self.refit != "none":
            # The covariances of the gradients at the MLPs' outputs, twice, and one on the device.
            outputs = sum(map(bool, spec.widths)) + sum(map(bool, spec.experts))
            self.covariances = 2 * outputs * self.hidden**2 * 4
            on_cpu = self.device.type == "cpu"
            self.tables += self.covariances if on_cpu else self.hidden**2 * 4
            # Second moments, of all experts of a layer, and what `obs` and the choice of a ridge
            # make of them, in fp64; the dense and pruned streams, or before those the streams with
            # each layer alone cut.
            own, each = spec.intermediate_size, spec.expert_width
            widest, count = max(own, each), spec.num_experts
            self.refit_bytes = 4 * widest**2 * 8
            self.refit_bytes += 2 * widest * (self.hidden + 4 * RIDGE_DIRECTIONS) * 8
            self.refit_bytes += count * (each**2 + each * self.hidden) * 8
            tokens = self.seq_len * self.sequences
            trains = self.refit == "reconstruct"
            # The narrowed MLP.
            self.refit_bytes += 3 * own * self.hidden * self.s
            cut = self.layers * min(tokens, max(FACTOR_TOKENS, self.seq_len))
            self.streams = (tokens + max(tokens, cut)) * self.hidden * self.s
            if on_cpu:
                # Streams; acts, or in their place what an MLP reads and shall add.
                read = 2 * self.hidden * self.w if trains else 0
                self.refit_bytes += self.streams + tokens * max(own * self.s, read)
            if trains:
                # Weights, the best of them, their gradients and Adam's moments; a step's rows.
                self.refit_bytes += 5 * 3 * own * self.hidden * self.w
                rows = min(RECONSTRUCTED_AT_ONCE, tokens)
                self.refit_bytes += rows * (6 * own + 5 * self.hidden) * self.w

    def plans(self, max_batch_size: int, exact: bool, offload: str) -> Iterator[Plan]:
        """Yield every plan that the options allow, the best first."""
        sizes = [max_batch_size]
        while not exact and sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        if offload in ("auto", "none"):
            for recompute in (False, True):
                for batch_size in sizes:
                    yield self._plan(batch_size, "none", recompute, self.weights, 0)
        if offload != "none" and (self.weights or offload != "auto"):
            for batch_size in sizes:
                yield self._streamed(batch_size, offload)

    def with_streams(self, plan: Plan) -> Plan:
        """Return a GPU's plan with streams and covariances there too, if they fit."""
        if self.device.type == "cpu" or self.refit == "none":
            return plan
        there = replace(
            plan,
            tables_bytes=plan.tables_bytes + self.covariances,
            refit_bytes=plan.refit_bytes + self.streams,
            streams_on_device=True,
        )
        return there if there.total_bytes <= self.free else plan

    def _streamed(self, batch_size: int, offload: str) -> Plan:
        """Return the plan of the largest pass whose layers' inputs fit."""
        weights = 2 * max(self._unit_bytes())
        on_host = self.device.type != "cpu"
        host = available_bytes(torch.device("cpu")) if on_host else 0
        # torch makes pinned memory a power of two: a layer's takes up to twice its weights.
        layer, head = (1 << (units - 1).bit_length() for units in self._unit_bytes())
        pinned = self.layers * layer + head
        if offload == "auto":
            needed = pinned + 2 * self._input_bytes(_HIDING_TOKENS)
            offload = "cpu" if host > needed else "disk"
        rows = batch_size * self.seq_len
        alone = self._plan(batch_size, offload, True, weights, rows)
        room = self.free - alone.total_bytes
        if on_host:
            room = (host - (pinned if offload == "cpu" else 2 * max(layer, head))) // 2
        more = max(0, int(room / _RECOMPUTE_SLACK) // self._input_bytes(1))
        limit = _MAX_PASS_TOKENS.get(self.device.type, 16384)
        tokens = min(rows + more, limit, self.sequences * self.seq_len) // rows * rows
        return self._plan(batch_size, offload, True, weights, max(rows, tokens))

    def _unit_bytes(self) -> tuple[int, int]:
        """Return the bytes of a unit of weights: of a layer, and of the final norm and the head."""
        head = (self.spec.vocab_size + 1) * self.hidden
        return self.spec.layer_params * self.s, head * self.s

    def _input_bytes(self, tokens: int) -> int:
        """Return the bytes of the inputs of all layers and the head, with the gradient there."""
        return tokens * (self.layers + 2) * self.hidden * self.s

    def _plan(
        self, batch_size: int, offload: str, recompute: bool, weights: int, pass_tokens: int
    ) -> Plan:
        s, w, hidden, width = self.s, self.w, self.hidden, self.width
        rows, attention = batch_size * self.seq_len, self.spec.attention_width
        on_host = pass_tokens > 0 and self.device.type != "cpu"
        qk_norm = 2 * w * attention if FAMILIES[self.spec.model_type].qk_norm else 0
        per_token = 2 * (w + s) * hidden + 4 * s * attention + 2 * s * width + qk_norm
        graph = rows * per_token
        # Beside the graph, in the layer that is running: forward, two of the MLP's
        # width and the norm's; backward, the gradient at act, and those around attention.
        passing = rows * max(
            2 * s * width + 3 * w * hidden,
            s * width + 2 * s * hidden,
            6 * s * attention + 4 * s * hidden + 2 * w * hidden,
        )
        if self.device.type == "cpu":
            passing += _PIECE_ROWS * width * 56
        logits = self._logits(weights)
        row = self.spec.vocab_size * s
        buffer = logits or max(LOGITS_BUDGET_BYTES, LOGITS_BUDGET_ROWS * row)
        head = min(buffer, rows * row) + rows * hidden * (3 * s + 3 * w)
        held = (1 if recompute else self.layers) * graph
        if recompute:
            held += 0 if on_host else self._input_bytes(max(rows, pass_tokens))
            held += (self.criteria - 1) * rows * hidden * s
            activations = held - graph + max(graph + passing, head)
        else:
            # Of all criteria but the last, gradients that cannot be written over gate and up.
            apart = 2 * rows * width * s if self.criteria > 1 else 0
            activations = held + max(passing + apart, head)
        return Plan(
            offload=offload,
            recompute=recompute,
            batch_size=batch_size,
            pass_tokens=pass_tokens,
            inputs_on_host=on_host,
            logits_budget_bytes=logits,
            weights_bytes=weights,
            activations_bytes=_LIBRARIES_BYTES
            + int(activations * (_RECOMPUTE_SLACK if recompute else _STORE_SLACK)),
            tables_bytes=self.tables,
            refit_bytes=self.refit_bytes,
            free_bytes=self.free,
        )

    def _logits(self, weights: int) -> int | None:
        """Return an eighth of what the weights leave free, None if that reaches the default."""
        eighth = (self.free - weights) // 8
        return None if eighth >= LOGITS_BUDGET_BYTES else max(_MIN_LOGITS_BYTES, eighth)
