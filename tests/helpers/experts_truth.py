"""What the scores, logits and pruned models of mixtures are held against: transformers' own model.

The losses are those of `family_truth`. Every expert is run on every token, and their outputs are
summed by a dense matrix of routing weights (T, E) that is 0 where an expert was not chosen;
autograd differentiates through that, the router too. a is an expert's input of down_proj, y its
output, g = dloss/da, which holds the routing weight, x = g a over the tokens that chose it.
Shapes: T tokens of one sequence, E experts, X layers with experts, F neurons of one site, D hidden.
A site is a layer, for its own MLP or the one beside its experts, or (layer, expert).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from family_truth import LossOf, own_logits
from mixture_configs import E, Mixture
from torch import Tensor, nn
from transformers import PreTrainedModel

Site = Any  # int, or (int, int)
Change = Callable[[Site, Tensor], Tensor]  # site, act (T, F): the act in its place


@dataclass
class Seen:
    """What one forward leaves: of each layer with experts, in the order of layers."""

    acts: dict[Site, Tensor] = field(default_factory=dict)  # (T, F)
    weights: dict[int, Tensor] = field(default_factory=dict)  # (T, E)
    chosen: dict[int, Tensor] = field(default_factory=dict)  # (T, E), 0 or 1
    each: dict[int, Tensor] = field(default_factory=dict)  # (E, T, D), the experts' own outputs
    output: dict[int, Tensor] = field(default_factory=dict)  # (T, D), what leaves the module


def layers_of(tiny: Mixture, model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(tiny.layers).children())


def find(layer: nn.Module, path: str) -> Any:
    """Return a submodule, or None."""
    names = {name for name, _ in layer.named_modules()}
    return layer.get_submodule(path) if path in names else None


def widths_of(tiny: Mixture, model: PreTrainedModel) -> dict[Site, int]:
    """Return the neurons of every site: a layer's own MLP, then its experts."""
    widths: dict[Site, int] = {}
    for number, layer in enumerate(layers_of(tiny, model)):
        down, experts = own_down(tiny, layer), find(layer, tiny.experts)
        if down is not None:
            widths[number] = down.in_features
        if experts is not None:
            bias = getattr(experts, "gate_up_proj_bias", None)
            down_proj = experts.down_proj
            width = down_proj.shape[2] if bias is None else down_proj.shape[1]
            widths |= {(number, expert): width for expert in range(len(down_proj))}
    return widths


def own_down(tiny: Mixture, layer: nn.Module) -> Any:
    """Return down_proj of the MLP that every token goes through; None if there is none."""
    shared = find(layer, tiny.shared) if tiny.shared else None
    return find(layer, tiny.down) if shared is None else shared


def down_of(tiny: Mixture, model: PreTrainedModel, site: Site) -> Tensor:
    """Return the weight (D, F) of a site's down_proj."""
    if isinstance(site, int):
        weight: Tensor = own_down(tiny, layers_of(tiny, model)[site]).weight
        return weight
    experts = find(layers_of(tiny, model)[site[0]], tiny.experts)
    weight = experts.down_proj[site[1]]
    return weight.t() if hasattr(experts, "down_proj_bias") else weight


@contextmanager
def all_experts(
    tiny: Mixture, model: PreTrainedModel, change: Change, seen: Seen, kept: Any = None
) -> Iterator[None]:
    """Inside, every expert runs on every token, and routers choose of kept {layer: (E,) bool}."""
    replaced: list[nn.Module] = []
    handles = []
    for number, layer in enumerate(layers_of(tiny, model)):
        down, experts = own_down(tiny, layer), find(layer, tiny.experts)
        if down is not None:
            handles.append(down.register_forward_pre_hook(_own_act(number, change, seen)))
        if experts is not None:
            experts.forward = _dense_forward(number, experts, change, seen)
            replaced.append(experts)
            if kept is not None:
                router = layer.get_submodule(tiny.router)
                router.forward = _router_forward(ROUTINGS[tiny.routing], router, kept[number])
                replaced.append(router)
    try:
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]
        for handle in handles:
            handle.remove()


def _own_act(number: int, change: Change, seen: Seen) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any) -> Any:
        act = inputs[0]
        seen.acts[number] = changed = change(number, act.reshape(-1, act.shape[-1]))
        return (changed.view(act.shape),)

    return hook


def _dense_forward(number: int, experts: Any, change: Change, seen: Seen) -> Callable[..., Any]:
    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        none = weights.new_zeros(len(hidden), len(experts.down_proj))
        seen.weights[number] = none.scatter(1, index, weights)
        seen.chosen[number] = none.scatter(1, index, 1.0)
        each = []
        for expert in range(len(experts.down_proj)):
            act = change((number, expert), act_of(experts, expert, hidden))
            seen.acts[number, expert] = act
            each.append(output_of(experts, expert, act))
        seen.each[number] = torch.stack(each)
        in_dtype = seen.weights[number].to(hidden.dtype)
        seen.output[number] = torch.einsum("te,etd->td", in_dtype, seen.each[number])
        return seen.output[number]

    return forward


def act_of(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """Return the input of an expert's down_proj (T, F)."""
    weight = experts.gate_up_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):  # gpt_oss
        both = hidden @ weight + experts.gate_up_proj_bias[expert]
        gate = both[:, 0::2].clamp(max=experts.limit)
        up = both[:, 1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * (experts.alpha * gate).sigmoid()
    width = len(weight) // 2
    act: Tensor = experts.act_fn(hidden @ weight[:width].t()) * (hidden @ weight[width:].t())
    return act


def output_of(experts: Any, expert: int, act: Tensor) -> Tensor:
    """Return an expert's output (T, D), its bias with it, before the routing weight."""
    weight = experts.down_proj[expert]
    if hasattr(experts, "down_proj_bias"):
        output: Tensor = act @ weight + experts.down_proj_bias[expert]
        return output
    return act @ weight.t()


def _router_forward(routing: Any, router: Any, kept: Tensor) -> Callable[..., Any]:
    def forward(hidden: Tensor) -> tuple[None, Tensor, Tensor]:
        weights, index = routing(router, hidden.reshape(-1, hidden.shape[-1]), kept)
        return None, weights, index

    return forward


def softmax_then_chosen(router: Any, hidden: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ router.weight.t()).masked_fill(~kept, -torch.inf)
    weights, index = logits.softmax(-1).topk(router.top_k)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(1, keepdim=True)
    return weights, index


def chosen_then_softmax(router: Any, hidden: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ router.weight.t() + getattr(router, "bias", 0.0)
    highest, index = logits.masked_fill(~kept, -torch.inf).topk(router.top_k)
    return highest.softmax(-1), index


def sigmoid_in_groups(router: Any, hidden: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    scores = (hidden @ router.weight.t()).sigmoid()
    choice = (scores + router.e_score_correction_bias).masked_fill(~kept, -torch.inf)
    groups = choice.view(len(hidden), router.num_group, -1)
    best = groups.topk(2).values.sum(-1).topk(router.topk_group).indices
    outside = torch.ones_like(groups[:, :, 0]).scatter(1, best, 0.0).bool()
    index = (
        groups.masked_fill(outside[:, :, None], -torch.inf).flatten(1).topk(router.top_k).indices
    )
    weights = scores.gather(1, index)
    if router.norm_topk_prob:
        weights = weights / weights.sum(1, keepdim=True)
    return weights * router.routed_scaling_factor, index


def softmax_scaled(router: Any, hidden: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    x = router.norm(hidden) * router.scale * hidden.shape[1] ** -0.5
    logits = (x @ router.proj.weight.t()).masked_fill(~kept, -torch.inf)
    weights, index = logits.softmax(-1).topk(router.config.top_k_experts)
    return weights / weights.sum(1, keepdim=True) * router.per_expert_scale[index], index


ROUTINGS = {
    "softmax": softmax_then_chosen,
    "chosen": chosen_then_softmax,
    "grouped": sigmoid_in_groups,
    "scaled": softmax_scaled,
}


def unchanged(site: Site, act: Tensor) -> Tensor:
    return act


def masked_logits(
    tiny: Mixture, model: PreTrainedModel, keep: Mapping[Site, Tensor], ids: Tensor
) -> Tensor:
    """Return the logits without the other neurons, and without the experts that keep leaves out."""
    layers = {site[0] for site in widths_of(tiny, model) if not isinstance(site, int)}
    kept = {n: torch.tensor([(n, expert) in keep for expert in range(E)]) for n in layers}

    def change(site: Site, act: Tensor) -> Tensor:
        alive = torch.zeros(act.shape[-1], dtype=act.dtype)
        alive[keep.get(site, torch.arange(0))] = 1
        return act * alive

    with torch.no_grad(), all_experts(tiny, model, change, Seen(), kept):
        return own_logits(model, ids)


def experts_scores(
    tiny: Mixture, model: PreTrainedModel, ids_of: Sequence[Tensor], losses_of: dict[str, LossOf]
) -> dict[str, dict[Any, Any]]:
    """Return of each loss l1, l2, fisher_mask, act {site: (F,)}, expert_taylor (X, E), loss (N,).

    Beside them "experts": expert_reap, expert_count and expert_mass, each (X, E).
    """
    sums: dict[Any, Any] = {name: {"loss": []} for name in losses_of}
    of_router = {name: torch.tensor(0.0) for name in ("norms", "count", "mass")}

    def change(site: Site, act: Tensor) -> Tensor:
        return act if act.requires_grad else act.detach().requires_grad_()

    for number, ids in enumerate(ids_of):
        seen = Seen()
        with torch.enable_grad(), all_experts(tiny, model, change, seen):
            logits = own_logits(model, ids)
        weighted = _weighted(seen)
        of_router["norms"] = of_router["norms"] + weighted.norm(dim=-1).sum(-1)
        for name, stored in (("count", seen.chosen), ("mass", seen.weights)):
            total = torch.stack([each.detach().sum(0) for each in stored.values()])
            of_router[name] = of_router[name] + total
        for name, loss_of in losses_of.items():
            with torch.enable_grad():
                loss = loss_of(logits, ids, number)
            inputs = [*seen.acts.values(), *seen.output.values()]
            grads = torch.autograd.grad(loss, inputs, retain_graph=True)
            at_output = torch.stack(grads[len(seen.acts) :])  # (X, T, D)
            taylor = torch.einsum("xtd,xetd->xet", at_output, weighted).abs().sum(-1)
            of_sites = _of_sites(seen, dict(zip(seen.acts, grads, strict=False)))
            for statistic, got in {**of_sites, "expert_taylor": taylor}.items():
                sums[name][statistic] = _plus(sums[name].get(statistic), got)
            sums[name]["loss"].append(loss.detach())
    for of_loss in sums.values():
        of_loss["loss"] = torch.stack(of_loss["loss"])
    norms, count, mass = of_router.values()
    reap = norms / count.clamp(min=1)
    return sums | {"experts": {"expert_reap": reap, "expert_count": count, "expert_mass": mass}}


def _weighted(seen: Seen) -> Tensor:
    """Return the experts' outputs times their routing weights (X, E, T, D)."""
    each = [seen.weights[n].t()[:, :, None] * output for n, output in seen.each.items()]
    return torch.stack(each).detach()


def _of_sites(seen: Seen, grads: dict[Site, Tensor]) -> dict[str, dict[Site, Tensor]]:
    of: dict[str, dict[Site, Tensor]] = {"l1": {}, "l2": {}, "fisher_mask": {}, "act": {}}
    for site, act in seen.acts.items():
        a = act.detach()
        if not isinstance(site, int):
            a = a * seen.chosen[site[0]][:, site[1], None]
        x = grads[site] * a
        of["l1"][site], of["l2"][site] = x.abs().sum(0), x.pow(2).sum(0)
        of["fisher_mask"][site], of["act"][site] = x.sum(0).pow(2), a.pow(2).sum(0)
    return of


def _plus(total: Any, more: Any) -> Any:
    if total is None:
        return more
    if isinstance(more, dict):
        return {site: total[site] + tensor for site, tensor in more.items()}
    return total + more
