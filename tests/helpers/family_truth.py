"""What every family's scores, logits and pruned models are held against: transformers' own model.

The definition is that of `truth`: the loss of a sequence is the mean over its positions of the
entropy of softmax(logits), or of -log p of given labels; a is the input of down_proj, g = dloss/da,
x = g a. Here the forward is the family's own, hooked at down_proj, each sequence alone and without
padding, and autograd differentiates through all of it. Softcaps and scales are thus the model's.
Shapes: N sequences, S positions, F intermediate_size, V vocab_size, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

LossOf = Callable[[Tensor, Tensor, int], Tensor]  # logits (S, V), ids (S,), the sequence's number


class Float64(TorchFunctionMode):
    """Inside, casts to float32 are casts to float64.

    Families compute norms, rotary angles, softmax and states in float32 even in a float64 model,
    where a difference in the last bit of float64 may become one in the last bit of float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if func in (Tensor.to, Tensor.type) or "softmax" in getattr(func, "__name__", ""):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def hooked(downs: Sequence[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Inside, hook(layer, act) returns what layer's down_proj gets in place of act."""

    def of(layer: int) -> Callable[..., Any]:
        return lambda module, inputs: (hook(layer, inputs[0]),)

    handles = [down.register_forward_pre_hook(of(i)) for i, down in enumerate(downs)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits (S, V) of one sequence (S,), as the model's own forward gives them."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def masked_logits(
    model: PreTrainedModel, downs: Sequence[nn.Module], keep: Any, ids: Tensor
) -> Tensor:
    """Return the logits of the dense model whose other neurons are set to 0."""

    def hook(layer: int, act: Tensor) -> Tensor:
        alive = torch.zeros(act.shape[-1], dtype=act.dtype)
        alive[keep[layer]] = 1
        return act * alive

    with torch.no_grad(), hooked(downs, hook):
        return own_logits(model, ids)


def own_scores(
    model: PreTrainedModel,
    downs: Sequence[nn.Module],
    ids_of: Sequence[Tensor],
    losses_of: dict[str, LossOf],
) -> dict[str, dict[str, Tensor]]:
    """Return l1, l2, fisher_mask, act, each (L, F), and "loss" (N,), of each loss."""
    sums: dict[str, list[Tensor]] = {name: [] for name in losses_of}
    losses: dict[str, list[Tensor]] = {name: [] for name in losses_of}
    acts: dict[int, Tensor] = {}

    def hook(layer: int, act: Tensor) -> Tensor:
        acts[layer] = act if act.requires_grad else act.detach().requires_grad_()
        return acts[layer]

    for number, ids in enumerate(ids_of):
        acts.clear()
        with torch.enable_grad(), hooked(downs, hook):
            logits = own_logits(model, ids)
        inputs = [acts[layer] for layer in range(len(downs))]
        for name, loss_of in losses_of.items():
            with torch.enable_grad():
                loss = loss_of(logits, ids, number)
            grads = torch.autograd.grad(loss, inputs, retain_graph=True)
            a = torch.stack([act.detach()[0] for act in inputs])  # (L, S, F)
            x = torch.stack([grad[0] for grad in grads]) * a
            of_sequence = (x.abs().sum(1), x.pow(2).sum(1), x.sum(1).pow(2), a.pow(2).sum(1))
            sums[name].append(torch.stack(of_sequence))
            losses[name].append(loss.detach())
    names = ("l1", "l2", "fisher_mask", "act")
    return {
        name: dict(zip(names, torch.stack(sums[name]).sum(0), strict=True))
        | {"loss": torch.stack(losses[name])}
        for name in losses_of
    }


def own_removal_costs(
    model: PreTrainedModel,
    downs: Sequence[nn.Module],
    ids_of: Sequence[Tensor],
    log_p_of: LossOf,
    ridge: float = 0.01,
) -> Tensor:
    """Return what removing each neuron costs when the others are refitted, (L, F).

    A = mean a aᵀ over the tokens, plus the ridge; C = mean g gᵀ, g the gradient of the sum over a
    sequence of log_p_of, a mean, at down_proj's output. scoring/obs.py has the equation.
    """
    acts: dict[int, list[Tensor]] = {layer: [] for layer in range(len(downs))}
    grads: dict[int, list[Tensor]] = {layer: [] for layer in range(len(downs))}

    def hook(layer: int, act: Tensor) -> Tensor:
        acts[layer].append(act.detach()[0])
        return act if act.requires_grad else act.detach().requires_grad_()

    outputs: list[Tensor] = []
    handles = [
        down.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for down in downs
    ]
    for number, ids in enumerate(ids_of):
        outputs.clear()
        with torch.enable_grad(), hooked(downs, hook):
            total = len(ids) * log_p_of(own_logits(model, ids), ids, number)
            for layer, grad in enumerate(torch.autograd.grad(total, outputs)):
                grads[layer].append(grad[0])
    for handle in handles:
        handle.remove()
    costs = []
    for layer, down in enumerate(downs):
        a, g = torch.cat(acts[layer]), torch.cat(grads[layer])
        gram = a.t() @ a / len(a)
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        costs.append(greedy_costs(gram.inverse(), down.weight.double(), g.t() @ g / len(g)))
    return torch.stack(costs)


def greedy_costs(inverse: Tensor, weight: Tensor, metric: Tensor) -> Tensor:
    """Always remove the lowest cost ½ vᵀ C v / H_jj, and refit the others to what it did."""
    costs, highest = inverse.new_zeros(len(inverse)), 0.0
    left = list(range(len(inverse)))
    while left:
        each = ((metric @ weight) * weight).sum(0) / inverse.diagonal() / 2
        j = min(left, key=each.tolist().__getitem__)
        costs[j] = highest = max(highest, float(each[j]))
        row = inverse[j] / inverse[j, j]
        weight = weight - weight[:, j : j + 1] * row
        inverse = inverse - torch.outer(inverse[j], row)
        left.remove(j)
    return costs
