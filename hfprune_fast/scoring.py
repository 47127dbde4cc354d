"""Run the model over token batches and add up every neuron's statistics.

The loss of a sequence is the mean of its positions' entropy; a micro-batch's loss is the sum over
its sequences, so each sequence's gradient is its own. Micro-batches run in passes, layer by layer:
forward through all layers, the head, which never holds all logits (`linear_entropy`), and back,
where `gated_mlp` adds up each layer. Each layer has a small autograd graph of its own, from its
input to its output, kept from the forward or made again in the backward (`recompute`). No parameter
ever requires grad and nothing below the first layer's MLP is differentiated.

A pass adds to a copy of the totals, layer by layer in the order of its micro-batches, and the copy
takes the totals' place when the pass is whole and finite. So a pass that ran out of memory, or was
interrupted, counts nothing, and the totals do not depend on how micro-batches are put into passes.

In float16 the gradients carry a power of two, which the statistics take out again, exactly; where
it overflows, the pass is run again with a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfprune_fast.errors import ArgumentError, MemoryShortageError, NumericsError, one_line
from hfprune_fast.forward import MicroBatch, ResidentModel
from hfprune_fast.gated_mlp import Scoring, scored
from hfprune_fast.kernels import TaylorStatistics, linear_entropy, resolve_backend
from hfprune_fast.report import say
from hfprune_fast.state import Totals


@dataclass(frozen=True)
class How:
    """How a run goes about it; none of it changes the scores but for rounding."""

    backend: str = "torch"
    parity: bool = False  # round as the paper's code does; micro-batches must be one sequence
    recompute: bool = False  # keep a layer's input instead of its graph
    inputs_on_host: bool = False  # keep the layers' inputs in host memory
    pass_tokens: int = 0  # micro-batches are put together into passes up to this many tokens
    logits_budget_bytes: int | None = None


def no_totals(model: ResidentModel, parity: bool) -> Totals:
    """Return the totals of no sequence, on the model's device."""
    mlps, device = model.parts.mlps, model.device
    shape = len(mlps), mlps[0].gate.weight.shape[0]
    dtype = model.dtype if parity else torch.float64
    return Totals(
        torch.zeros(len(TaylorStatistics._fields), *shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=torch.float64, device=device),
    )


def score_batches(
    model: ResidentModel,
    batches: Sequence[MicroBatch],
    how: How,
    totals: Totals | None = None,
    *,
    most: int | None = None,
    committed: Callable[[Totals, int], object] = lambda totals, most: None,
    done: Callable[[float], object] = lambda tokens: None,
) -> Totals:
    """Score every MLP neuron over micro-batches, in their order.

    Out of memory, micro-batches and passes are halved, then layers recomputed, and the pass is run
    again.

    Args:
        model: entered, so in evaluation mode.
        batches: micro-batches, also those that are done.
        how: ways and means.
        totals: those of the first sequences, which are done; by default of none.
        most: how many sequences a micro-batch may have, if by now less than they have.
        committed: called after each pass with the new totals and the most sequences that a
            micro-batch now has.
        done: called with the tokens that were worked on, a layer at a time; in all, as many as
            there were to do.

    Raises:
        MemoryShortageError: not even one sequence fits, with recomputing.
        NumericsError: NaN or inf in a weight or a layer's activations or gradients, named.
    """
    totals = totals or no_totals(model, how.parity)
    most = most or max((len(batch.ids) for batch in batches), default=0)
    todo = _left(batches, totals.samples, most)
    while todo:
        a_pass = _next_pass(todo, how.pass_tokens)
        run = _Pass(model, a_pass, how, done)
        try:
            totals = run.add_to(totals)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            why = one_line(error)
            error.__traceback__ = None  # which holds the tensors of the pass
        else:
            todo = todo[len(a_pass) :]
            committed(totals, most)
            continue
        done(-run.counted)
        run.clear()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        largest = max(len(batch.ids) for batch in a_pass)
        passes = ""
        if len(a_pass) > 1:  # whose layers' inputs may be what did not fit
            how = replace(how, pass_tokens=sum(batch.ids.numel() for batch in a_pass) // 2)
            passes = f", at most {how.pass_tokens} tokens a pass"
        if largest > 1 or passes:
            most = (largest + 1) // 2
            todo = _left(batches, totals.samples, most)
            say(f"out of memory; going on with micro-batches of {most}{passes}")
        elif not how.recompute:
            how = replace(how, recompute=True)
            say("out of memory; going on with layers recomputed in the backward")
        else:
            raise MemoryShortageError(
                "out of memory with one sequence at a time; try a smaller --seq-len, "
                f"--dtype bfloat16 or --offload disk ({why})"
            )
    return totals


def backend_for(tensor: Tensor, backend: str | None, parity: bool) -> str:
    """Return the backend that will score a model whose weights are like tensor."""
    try:
        chosen = resolve_backend(backend or ("torch" if parity else None), tensor)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    if parity and chosen == "triton":
        raise ArgumentError("parity rounds as plain torch does; backend must be torch, got triton")
    return chosen


def _left(batches: Sequence[MicroBatch], samples: int, most: int) -> list[MicroBatch]:
    """Return what is left when so many sequences are done, in micro-batches of at most `most`.

    Of nothing else, so that a run that is resumed goes on with the same ones.
    """
    left: list[MicroBatch] = []
    for batch in batches:
        done = min(samples, len(batch.ids))
        samples -= done
        if done < len(batch.ids):
            left += MicroBatch(batch.ids[done:], batch.lengths[done:]).split(most)
    return left


def _next_pass(todo: list[MicroBatch], tokens: int) -> list[MicroBatch]:
    """Return the first micro-batches, as many as hold so many tokens, padding too; at least 1."""
    a_pass = todo[:1]
    held = todo[0].ids.numel()
    for batch in todo[1:]:
        held += batch.ids.numel()
        if held > tokens:
            break
        a_pass.append(batch)
    return a_pass


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: CUDA's class, Python's, or what torch's CPU allocator raises."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        any(text in str(error) for text in ("allocate memory", "enough memory", "out of memory"))
    )


class _Pass:
    """One pass of micro-batches through the model and back."""

    def __init__(
        self,
        model: ResidentModel,
        batches: list[MicroBatch],
        how: How,
        done: Callable[[float], object],
    ) -> None:
        self.model, self.batches, self.how, self.done = model, batches, how, done
        self.layers = len(model.parts.layers)
        self.counted = 0.0
        # Of each micro-batch, the layers' inputs and, unless recomputing, outputs.
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[list[Tensor]] = []
        self.masks = [
            None if batch.token_mask is None else batch.token_mask.to(model.device)
            for batch in batches
        ]

    def add_to(self, totals: Totals) -> Totals:
        """Return the totals with this pass added, for the first gradient scale without overflow."""
        for attempt in range(5 if self.model.dtype == torch.float16 and not self.how.parity else 1):
            self.done(-self.counted)
            self.clear()
            statistics, down_norm, losses = self._run(totals, attempt)
            loss = sum(losses)
            if bool(statistics.isfinite().all()) or not math.isfinite(loss):
                break
        _check_finite(statistics, loss)
        return Totals(
            statistics,
            down_norm,
            totals.samples + sum(len(batch.ids) for batch in self.batches),
            totals.tokens + sum(batch.tokens for batch in self.batches),
            sum(losses, totals.entropy_nats),
        )

    def clear(self) -> None:
        """Let go of what the pass holds."""
        self.inputs = [[] for _ in self.batches]
        self.outputs = [[] for _ in self.batches]
        self.counted = 0.0

    def _run(self, totals: Totals, attempt: int) -> tuple[Tensor, Tensor, list[float]]:
        model = self.model
        staged, down_norm = totals.statistics.clone(), totals.down_norm.clone()
        scales = [self._grad_scale(batch, attempt) for batch in self.batches]
        hidden = [self._hold(model.begin(batch)) for batch in self.batches]
        for layer in range(self.layers):
            with model.weights_of(layer, then=layer + 1):
                if totals.samples == 0:
                    down_norm[layer] = column_norms(model.parts.mlps[layer].down.weight)
                for i in self._each():
                    hidden[i] = self._forward(layer, i, hidden[i], staged[:, layer], scales[i])
        losses = []
        with model.weights_of(self.layers, then=self.layers - 1):
            for i in self._each():
                loss, hidden[i] = self._head(i, hidden[i], scales[i])
                losses.append(loss)
        for layer in reversed(range(self.layers)):
            with model.weights_of(layer, then=max(0, layer - 1)):
                for i in self._each():
                    hidden[i] = self._backward(layer, i, hidden[i], staged[:, layer], scales[i])
        # Read here, where the device is waited for anyway.
        return staged, down_norm, [float(loss) for loss in losses]

    def _each(self) -> Iterator[int]:
        """Number of each micro-batch, which has been worked on in one of the layers or the head."""
        for i, batch in enumerate(self.batches):
            yield i
            tokens = batch.tokens / (2 * self.layers + 1)
            self.counted += tokens
            self.done(tokens)

    def _grad_scale(self, batch: MicroBatch, attempt: int) -> float:
        if self.model.dtype != torch.float16 or self.how.parity:
            return 1.0
        # 64 to 128 in each row of the loss, whatever the length; a sixteenth each time it is run.
        return float(2.0 ** (6 + math.ceil(math.log2(batch.ids.shape[1])) - 4 * attempt))

    def _forward(self, layer: int, i: int, hidden: Tensor, staged: Tensor, scale: float) -> Tensor:
        if self.how.recompute:
            self.inputs[i].append(hidden)
            with torch.no_grad():
                return self._hold(self.model.run(layer, self._brought(hidden), self.batches[i]))
        self._with_graph(layer, i, hidden, staged, scale, only_backward=False)
        return self.outputs[i][-1].detach()

    def _with_graph(
        self, layer: int, i: int, hidden: Tensor, staged: Tensor, scale: float, only_backward: bool
    ) -> None:
        """Run a layer with an autograd graph from its input to its output, which are kept."""

        def take(statistics: TaylorStatistics) -> None:
            staged.add_(torch.stack(statistics))

        needs_grad = layer > 0
        scoring = Scoring(take, self.masks[i], scale, self.how.parity, self.how.backend)
        hidden = hidden.detach().requires_grad_(needs_grad)
        mlp = self.model.parts.mlps[layer]
        with (
            torch.enable_grad(),
            scored(mlp, scoring, needs_grad=needs_grad, only_backward=only_backward),
        ):
            output = self.model.run(layer, hidden, self.batches[i])
        self.inputs[i].append(hidden)
        self.outputs[i].append(output)

    def _head(self, i: int, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the sum of the sequences' losses and the gradient at the last layer's output."""
        batch, head = self.batches[i], self.model.parts.head
        hidden = self._brought(hidden).detach().requires_grad_()
        with torch.enable_grad():
            normed = self.model.parts.norm(hidden)
        row_weight = torch.tensor([1 / n for n in batch.lengths], dtype=torch.float64)
        row_weight = row_weight[:, None].expand(batch.ids.shape).to(self.model.device)
        mask = self.masks[i]
        if mask is not None:
            row_weight = row_weight * mask
        loss, d_normed = linear_entropy(
            normed.flatten(0, 1),
            head.weight,
            row_weight.flatten(),
            bias=head.bias,
            grad_scale=scale,
            logits_budget_bytes=self.how.logits_budget_bytes,
            backend=self.how.backend,
        )
        normed.backward(d_normed.view_as(normed))
        assert hidden.grad is not None
        return loss, self._hold(hidden.grad)

    def _backward(
        self, layer: int, i: int, d_output: Tensor, staged: Tensor, scale: float
    ) -> Tensor:
        """Return the gradient at a layer's input; nothing of use at the first's."""
        if self.how.recompute:
            hidden = self._brought(self.inputs[i].pop())
            self._with_graph(layer, i, hidden, staged, scale, only_backward=True)
        hidden, output = self.inputs[i].pop(), self.outputs[i].pop()
        output.backward(self._brought(d_output))
        return d_output if hidden.grad is None else self._hold(hidden.grad)

    def _hold(self, tensor: Tensor) -> Tensor:
        """Put away what is needed again when a layer has run for all micro-batches."""
        if not self.how.inputs_on_host:
            return tensor
        # The copies are ordered by the device's stream, so nothing waits for them here.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return pinned.copy_(tensor, non_blocking=True)

    def _brought(self, tensor: Tensor) -> Tensor:
        """Return what was put away, on the device."""
        return tensor.to(self.model.device, non_blocking=True)


def column_norms(weight: Tensor) -> Tensor:
    """Return the 2-norm of each column of a (D, F) weight, fp64, a block of rows at a time."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.detach().split(256):
        squares += block.double().square().sum(dim=0)
    return squares.sqrt()


def _check_finite(staged: Tensor, loss: float) -> None:
    """Name where NaN or inf appeared first: forward through the layers, the head, and back."""
    statistics = TaylorStatistics(*staged.isfinite().all(dim=2).unbind())
    if not bool(statistics.act.all()):
        layer = int((~statistics.act).nonzero()[0])
        raise NumericsError(f"NaN or inf in the MLP activations of layer {layer}; try float32")
    if not math.isfinite(loss):
        raise NumericsError("NaN or inf in the logits, after finite MLP activations; try float32")
    finite = torch.stack(statistics).all(dim=0)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[-1])  # the backward meets the last layer first
        raise NumericsError(f"NaN or inf in the gradient at the MLP of layer {layer}; try float32")
