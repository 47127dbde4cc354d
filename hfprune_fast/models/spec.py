"""ModelSpec: the sizes of a model, and what pruning makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from hfprune_fast.models.declared import family_type, text_part
from hfprune_fast.models.families import FAMILIES
from hfprune_fast.models.plain import adapters_in
from hfprune_fast.models.sites import ModelParts, SiteKey, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What the layers are called that read the result of attention, a convolution or the like.
_MIXED = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class ModelSpec:
    """What budgets, memory estimates and FLOP counts depend on."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    total_params: int  # tied ones once
    linear_params: int  # weights of linear layers, the head among them
    params_per_neuron: int  # biases included
    # If not all are intermediate_size, the widest; 0 where a layer has experts alone.
    mlp_widths: tuple[int, ...] | None = None
    vocab_size: int = 0
    attention_width: int = 0  # heads · head_dim
    experts: tuple[int, ...] = ()  # how many each layer has; empty where none has any
    expert_width: int = 0  # neurons of each
    experts_per_token: int = 0
    expert_params_per_neuron: int = 0
    params_per_expert: int = 0  # beside its neurons: its entries in the router, a bias
    expert_groups: int = 1  # of which a token's experts are in groups_per_token
    groups_per_token: int = 1

    def __post_init__(self) -> None:
        uniform = self.mlp_widths is None or set(self.mlp_widths) == {self.intermediate_size}
        widths = None if uniform else tuple(self.mlp_widths or ())
        object.__setattr__(self, "mlp_widths", widths)
        object.__setattr__(self, "experts", tuple(self.experts) if any(self.experts) else ())

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each layer's MLP."""
        return self.mlp_widths or (self.intermediate_size,) * self.num_layers

    @property
    def mean_width(self) -> float:
        """Neurons of a layer's MLP, on average."""
        return sum(self.widths) / self.num_layers

    @property
    def sites(self) -> dict[SiteKey, int]:
        """The neurons of each MLP, by layer; of each expert, by (layer, expert)."""
        return dict(self._sites())

    def _sites(self) -> Iterator[tuple[SiteKey, int]]:
        for layer, width in enumerate(self.widths):
            if width:
                yield layer, width
            for expert in range(self.experts[layer] if self.experts else 0):
                yield (layer, expert), self.expert_width

    @property
    def shared_is_multiple(self) -> bool:
        """Whether the width of shared experts is a multiple of the others', with no key for it."""
        described = FAMILIES[self.model_type].experts
        return described is not None and described.shared_width == ""

    @property
    def num_experts(self) -> int:
        """How many a layer has; 0 where none has any."""
        return max(self.experts, default=0)

    @property
    def least_experts(self) -> int:
        """The fewest experts of a layer from which its router can choose.

        Each group needs the two by which it is ranked, and a token's share of one that is chosen.
        One expert alone is no mixture: files that hold it apart look as those of all.
        """
        if self.expert_groups == 1:
            return max(2, self.experts_per_token)
        share = -(-self.experts_per_token // self.groups_per_token)
        return self.expert_groups * max(2, share)

    @property
    def layer_params(self) -> int:
        """Parameters of the widest layer, or a few more."""
        head, added = self.vocab_size * self.hidden_size, 4 * self.hidden_size
        per_width = 3 * self.hidden_size
        own = self.intermediate_size * per_width
        of_experts = self.num_experts * self._params_of_expert(self.expert_width)
        mlps = sum(self.widths) * per_width + sum(map(bool, self.experts)) * of_experts
        return (self.linear_params - head - mlps) // self.num_layers + own + of_experts + added

    @property
    def flops_per_token(self) -> int:
        """Products of a forward and an activation-gradient pass, without attention's: 4·P."""
        return 4 * self.linear_params_at(self.widths)

    def params_at(self, widths: int | Sequence[int], experts: tuple[int, int] | None = None) -> int:
        """Return the parameters of the whole model with MLPs of this width, or these.

        Args:
            experts: how many each layer keeps that has any, and the neurons of each.
        """
        without = self.total_params - self._removed(widths) * self.params_per_neuron
        layers = sum(1 for count in self.experts if count)
        count, width = experts or (self.num_experts, self.expert_width)
        had = self.num_experts * self._params_of_expert(self.expert_width)
        return without - layers * (had - count * self._params_of_expert(width))

    def active_params_at(
        self, widths: int | Sequence[int], experts: tuple[int, int] | None = None
    ) -> int:
        """Return how many parameters a token goes through: all but of experts not chosen."""
        layers = sum(1 for count in self.experts if count)
        count, width = experts or (self.num_experts, self.expert_width)
        has_biases = self.expert_params_per_neuron > 3 * self.hidden_size
        bias = self.hidden_size if has_biases else 0
        idle = (count - self.experts_per_token) * (width * self.expert_params_per_neuron + bias)
        return self.params_at(widths, experts) - layers * idle

    def _params_of_expert(self, width: int) -> int:
        return width * self.expert_params_per_neuron + self.params_per_expert

    def linear_params_at(
        self, widths: int | Sequence[int], experts: tuple[int, int] | None = None
    ) -> int:
        """Return the weights of linear layers that a token meets, each 2 FLOPs.

        With MLPs of these widths, or this; of experts, those that a token chooses.
        """
        _, width = experts or (self.num_experts, self.expert_width)
        had = self.num_experts * self.expert_width
        layers = sum(map(bool, self.experts))
        idle = layers * (had - self.experts_per_token * width) if layers else 0
        return self.linear_params - (self._removed(widths) + idle) * 3 * self.hidden_size

    def pruned_to(
        self, widths: int | Sequence[int], experts: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """Return widths, parameters and ratios after pruning the MLPs to this width, or these.

        `mlp_widths` and `dense_mlp_widths` are there when they differ from layer to layer; 0 is of
        a layer that has experts alone. `prune_ratio` is of all neurons, experts' among them.

        Args:
            experts: of a model that has any: how many each layer keeps, and the neurons of each.
        """
        params = self.params_at(widths, experts)
        each = [widths] if isinstance(widths, int) else list(widths)
        kept = sum(self.widths) - self._removed(widths)
        total = sum(self.widths)
        of_experts = {}
        if self.experts:
            count, width = experts or (self.num_experts, self.expert_width)
            layers = sum(1 for had in self.experts if had)
            kept += layers * count * width
            total += layers * self.num_experts * self.expert_width
            of_experts = {
                "experts": count,
                "dense_experts": self.num_experts,
                "expert_width": width,
                "dense_expert_width": self.expert_width,
                "active_params": self.active_params_at(widths, experts),
                "dense_active_params": self.active_params_at(self.widths),
            }
        achieved: dict[str, Any] = {
            "intermediate_size": max(each),
            "dense_intermediate_size": self.intermediate_size,
            "prune_ratio": 1 - kept / total,
            "params": params,
            "dense_params": self.total_params,
            "param_ratio": 1 - params / self.total_params,
            **of_experts,
        }
        if len(set(each)) > 1:
            achieved["mlp_widths"] = each
        if self.mlp_widths is not None:
            achieved["dense_mlp_widths"] = list(self.mlp_widths)
        return achieved

    def _removed(self, widths: int | Sequence[int]) -> int:
        kept = self.num_layers * widths if isinstance(widths, int) else sum(widths)
        return sum(self.widths) - kept


def spec_of(model: PreTrainedModel) -> ModelSpec:
    """Count the parameters of a model, which may be on the meta device."""
    parts = parts_of(model)
    hidden = parts.head.weight.shape[1]
    widths = tuple(0 if mlp is None else mlp.width for mlp in parts.mlps)
    biases = sum(
        times
        for mlp in list(parts.own_mlps.values())[:1]
        for linear, axis, times in mlp.linears
        if axis == 0 and linear.bias is not None
    )
    # Adapters on other layers go before a model is saved as what these sizes are compared with.
    added = {
        id(parameter)
        for adapter in adapters_in(model)
        for name, parameter in adapter.named_parameters()
        if not name.startswith("base_layer.")
    }
    run = (parts.decoder, parts.head)  # what stands beside them, such as vision, is not counted
    own = {id(p): p for m in run for p in m.parameters() if id(p) not in added}
    return ModelSpec(
        model_type=str(family_type(text_part(model.config.to_dict()))),
        num_layers=len(parts.layers),
        hidden_size=hidden,
        intermediate_size=max(widths),
        total_params=sum(p.numel() for p in own.values()),
        linear_params=sum(
            m.weight.numel()
            for m in (*parts.decoder.modules(), parts.head)
            if isinstance(m, nn.Linear) and id(m.weight) not in added
        )
        + sum(
            parameter.numel()
            for of in parts.with_experts.values()
            for parameter in (of.module.gate_up_proj, of.module.down_proj)
        ),
        params_per_neuron=3 * hidden + biases,
        mlp_widths=widths,
        vocab_size=parts.head.weight.shape[0],
        attention_width=max(map(_mixed_width, parts.layers)),
        **_experts(parts, model.config),
    )


def _experts(parts: ModelParts, config: Any) -> dict[str, Any]:
    """Return what a spec says of experts; nothing where there are none."""
    experts = parts.with_experts
    if not experts:
        return {}
    first = next(iter(experts.values()))
    text = config if parts.family.tower is None else config.text_config
    hidden, biases = parts.head.weight.shape[1], "gate_up_proj_bias" in first.module._parameters
    groups = int(getattr(text, first.described.groups or "", 1) or 1)
    of_router = sum(
        tensor[0].numel()
        for module, name, tensor in first.per_expert()
        if name in module._parameters  # a buffer is no parameter, though files hold it
    )
    return {
        "experts": tuple(0 if each is None else each.count for each in parts.experts),
        "expert_width": first.width,
        "experts_per_token": int(getattr(text, first.described.chosen)),
        "expert_groups": groups,
        "groups_per_token": int(getattr(text, "topk_group", groups) or groups) if groups > 1 else 1,
        "expert_params_per_neuron": 3 * hidden + 2 * biases,
        "params_per_expert": of_router + hidden * biases,
    }


def _mixed_width(layer: nn.Module) -> int:
    """Return the width of what a layer mixes tokens in: heads · head_dim of attention."""
    return sum(
        module.in_features
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        and name.removesuffix(".base_layer").rpartition(".")[2] in _MIXED  # beside an adapter
    )
