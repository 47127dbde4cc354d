"""What a refit and a reconstruction are held to: plain float64, and the neurons that are kept."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from truth import attention, rms_norm

from hfprune_fast.data.batches import MicroBatch

GATE_UP_DOWN = ("gate", "up", "down")


def keep_of(model: PreTrainedModel, widths: tuple[int, ...] = (50, 20, 77)) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(4)
    dense = model.config.intermediate_size
    return {
        layer: torch.randperm(dense, generator=generator)[:width].sort().values
        for layer, width in enumerate(widths)
    }


def plain_fit(acts: Tensor, wanted: Tensor, down: Tensor, choosing: int) -> Tensor:
    """Return V (D, K) of least ‖acts Vᵀ - wanted‖² + λ ‖V - down‖², λ as the refit has it.

    choosing: so many of the last rows choose λ.
    """

    def fit(rows: slice, ridge: float) -> Tensor:
        a, y = acts[rows], wanted[rows]
        pull = (ridge * a.square().sum(0)).sqrt()
        solution: Tensor = torch.linalg.lstsq(
            torch.cat([a, pull.diag()]), torch.cat([y, pull[:, None] * down.t()])
        ).solution
        return solution.t()

    seen, held = slice(len(acts) - choosing), slice(len(acts) - choosing, None)

    def error(ridge: float) -> float:
        return float((acts[held] @ fit(seen, ridge).t() - wanted[held]).square().sum())

    ridge = min((0.01, 0.03, 0.1, 0.3, 1, 3), key=error) if choosing else 0.1
    return fit(slice(None), ridge)


class PlainModel:
    """A float64 model of which only what is read off its state_dict is known."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def before_mlp(self, hidden: Tensor, layer: int) -> Tensor:
        name = f"model.layers.{layer}.input_layernorm.weight"
        normed = rms_norm(hidden, self.weights[name], self.config.rms_norm_eps)
        return hidden + attention(self.weights, self.config, layer, normed)

    def mlp_input(self, hidden: Tensor, layer: int) -> Tensor:
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        return rms_norm(hidden, self.weights[name], self.config.rms_norm_eps)

    def mlp(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        name = f"model.layers.{layer}.mlp"
        gate, up, down = (self.weights[f"{name}.{leaf}_proj.weight"] for leaf in GATE_UP_DOWN)
        return gate, up, down


def plain_refit(
    model: PreTrainedModel, batches: list[MicroBatch], keep: dict[int, Tensor]
) -> list[Tensor]:
    """Each layer's least squares over all tokens at once, by lstsq on acts above a ridge."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    eps = model.config.rms_norm_eps
    sequences = [
        ids[:length]
        for batch in batches
        for ids, length in zip(batch.ids, batch.lengths, strict=True)
    ]
    dense = [weights["model.embed_tokens.weight"][ids] for ids in sequences]
    pruned = list(dense)
    found = []
    for layer in range(model.config.num_hidden_layers):
        name = f"model.layers.{layer}"

        def before_mlp(hidden: Tensor, layer: int = layer, name: str = name) -> Tensor:
            h = rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], eps)
            return hidden + attention(weights, model.config, layer, h)

        def act_of(hidden: Tensor, name: str = name) -> Tensor:
            h = rms_norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], eps)
            gate = linear(weights, f"{name}.mlp.gate_proj", h)
            return gate * torch.sigmoid(gate) * linear(weights, f"{name}.mlp.up_proj", h)

        down, bias = weights[f"{name}.mlp.down_proj.weight"], bias_of(weights, name)
        dense = [before_mlp(h) for h in dense]
        dense = [h + act_of(h) @ down.t() + bias for h in dense]
        pruned = [before_mlp(h) for h in pruned]
        acts = [act_of(h)[:, keep[layer]] for h in pruned]
        rows = torch.cat(acts)
        wanted = torch.cat([x - h - bias for x, h in zip(dense, pruned, strict=True)])
        choosing = sum(map(len, acts[len(acts) - len(acts) // 8 :]))
        fitted = plain_fit(rows, wanted, down[:, keep[layer]], choosing)
        pruned = [h + a @ fitted.t() + bias for h, a in zip(pruned, acts, strict=True)]
        found.append(fitted)
    return found


def linear(weights: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    return h @ weights[f"{name}.weight"].t() + weights.get(f"{name}.bias", 0)


def bias_of(weights: dict[str, Tensor], name: str) -> Any:
    return weights.get(f"{name}.mlp.down_proj.bias", 0)
