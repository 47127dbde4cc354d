"""The naive implementation that the engine must not be worse than: transformers and autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def record_acts(acts: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
    """A forward pre-hook of down_proj that keeps its input, in the autograd graph."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        act = inputs[0]
        if not act.requires_grad:
            act = act.detach().requires_grad_()
        acts.append(act)
        return (act,)

    return hook


def eager_scores(model: PreTrainedModel, sequences: Tensor) -> dict[str, Tensor]:
    """l1, l2, mask, act (L, F) float64 and "loss" (N,) of sequences (N, S), in the model's dtype.

    Logits, and the products g * a, are upcast to fp32 (float64 stays); the sums are float64.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    losses, per_sequence = [], []
    acts: list[Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(record_acts(acts))
        for layer in model.get_decoder().layers
    ]
    try:
        for ids in sequences:
            acts.clear()
            with torch.enable_grad():
                logits = model(ids[None], use_cache=False).logits[0].to(wide)
                log_p = torch.log_softmax(logits, dim=-1)
                loss = -(torch.softmax(logits, dim=-1) * log_p).sum(dim=-1).mean()
                grads = torch.autograd.grad(loss, acts)
            a = torch.stack([act.detach()[0] for act in acts]).to(wide)
            x = (torch.stack([grad[0] for grad in grads]).to(wide) * a).double()
            a = a.double()
            sums = (x.abs().sum(1), x.pow(2).sum(1), x.sum(1).pow(2), a.pow(2).sum(1))
            per_sequence.append(torch.stack(sums))
            losses.append(loss.detach().double())
    finally:
        for hook in hooks:
            hook.remove()
    l1, l2, mask, act = torch.stack(per_sequence).sum(dim=0)
    return {"l1": l1, "l2": l2, "fisher_mask": mask, "act": act, "loss": torch.stack(losses)}
