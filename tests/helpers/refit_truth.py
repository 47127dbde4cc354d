"""What a refit and a reconstruction are held to: plain float64, and the neurons that are kept."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from truth import attention, rms_norm

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
