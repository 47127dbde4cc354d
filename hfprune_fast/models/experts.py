"""The experts of a layer as transformers runs them: one module, whose parameters hold them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_fast.errors import UnsupportedModelError
from hfprune_fast.models.families import Experts


@dataclass(frozen=True)
class ExpertsMLP:
    """The experts of one layer, each down(act_fn(gate(x)) * up(x)) or the like.

    The parameters, E experts: gate_up_proj (E, 2F, D) with gate's rows before up's, and down_proj
    (E, D, F); where `described.transposed`, (E, D, 2F) with a neuron's gate and up side by side,
    and (E, F, D). `gate_up` and `act` are of (n, 2F) and (n, F) in the module's own order.
    """

    module: Any
    layer: nn.Module
    described: Experts

    @property
    def count(self) -> int:
        return int(self.module.down_proj.shape[0])

    @property
    def width(self) -> int:
        """The number of neurons of each."""
        return int(self.module.down_proj.shape[1 if self.described.transposed else 2])

    @property
    def can_be_grouped(self) -> bool:
        """Whether torch's grouped products, transformers' default, take parameters like these.

        They know no float64, and rows begin at multiples of 16 bytes.
        """
        weights = (self.module.gate_up_proj, self.module.down_proj)
        return all(
            weight.dtype != torch.float64 and weight.shape[-1] * weight.itemsize % 16 == 0
            for weight in weights
        )

    def down(self, expert: int) -> Tensor:
        """Return an expert's down projection (D, F), a view."""
        weight: Tensor = self.module.down_proj.detach()[expert]
        return weight.t() if self.described.transposed else weight

    def down_bias(self, expert: int) -> Tensor | None:
        bias = getattr(self.module, "down_proj_bias", None)
        return None if bias is None else bias.detach()[expert]

    def gate_up_weight(self, expert: int) -> Tensor:
        """Return an expert's gate and up projections (2F, D), a view."""
        weight: Tensor = self.module.gate_up_proj.detach()[expert]
        return weight.t() if self.described.transposed else weight

    def gate_up(self, expert: int, x: Tensor) -> Tensor:
        """Return gate(x) and up(x) of (n, D) rows."""
        bias = getattr(self.module, "gate_up_proj_bias", None)
        of_expert = None if bias is None else bias.detach()[expert]
        return nn.functional.linear(x, self.gate_up_weight(expert), of_expert)

    def halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up, (n, F) views."""
        if self.described.transposed:
            return gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate_up.chunk(2, dim=-1)
        return gate, up

    def act(self, gate_up: Tensor) -> Tensor:
        """Return the input of down_proj."""
        act: Tensor = self.module._apply_gate(gate_up)
        return act

    def output(self, expert: int, act: Tensor) -> Tensor:
        """Return what an expert makes of its acts, (n, D)."""
        return nn.functional.linear(act, self.down(expert), self.down_bias(expert))

    def per_expert(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Yield each of the router's tensors with an entry for each expert, its module and name."""
        for name in self.described.per_expert:
            path, _, leaf = name.rpartition(".")
            module = self.layer.get_submodule(path)
            tensor = getattr(module, leaf, None)
            if tensor is not None:
                yield module, leaf, tensor


def experts_of(layer: nn.Module, described: Experts | None) -> ExpertsMLP | None:
    """Return the experts of a layer, None if it has none.

    Raises:
        UnsupportedModelError: they are not as the family describes them.
    """
    if described is None:
        return None
    try:
        module: Any = layer.get_submodule(described.path)
    except AttributeError:
        return None
    across = described.transposed
    expected = {
        "has_gate": True,
        "has_post_expert_norm": False,
        "is_transposed": across,
        "is_concatenated": not across,
        "_is_expert_parallel": False,
    }
    for name, value in expected.items():
        got = getattr(module, name, False)  # earlier versions of transformers lack some
        if got is not value:
            raise UnsupportedModelError(
                f"{type(module).__name__} has {name} {got!r:.20}, and such experts are not known"
            )
    held = set(module._parameters)
    if held not in ({"gate_up_proj", "down_proj"}, {*_WITH_BIASES}) or module._modules.keys() - {
        "act_fn"
    }:
        raise UnsupportedModelError(
            f"{type(module).__name__} holds {', '.join(sorted(held | set(module._modules)))}, and "
            "such experts are not known"
        )
    return ExpertsMLP(module, layer, described)


_WITH_BIASES = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
