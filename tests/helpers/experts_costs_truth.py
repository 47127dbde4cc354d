"""What removing a neuron of a mixture costs when the others of its MLP or expert are refitted.

As `family_truth.own_removal_costs`, with the experts of `experts_truth`: of an expert, A is the
mean over all tokens of w² a aᵀ, w its routing weight, and C that of g gᵀ at the experts' output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from experts_truth import Seen, Site, all_experts, down_of, layers_of, own_down, widths_of
from family_truth import LossOf, greedy_costs, own_logits
from mixture_configs import Mixture
from torch import Tensor
from transformers import PreTrainedModel

ROWS_A_NEURON = 8  # an expert with fewer rows is left out: its costs are 0


def experts_removal_costs(
    tiny: Mixture,
    model: PreTrainedModel,
    ids_of: Sequence[Tensor],
    log_p_of: LossOf,
    ridge: float = 0.01,
) -> dict[Site, Tensor]:
    """Return {site: (F,)}."""
    layers, widths = layers_of(tiny, model), widths_of(tiny, model)
    downs = {n: own_down(tiny, layer) for n, layer in enumerate(layers) if n in widths}
    acts: dict[Site, list[Tensor]] = {site: [] for site in widths}
    rows = dict.fromkeys(widths, 0)
    grads: dict[Any, list[Tensor]] = {}
    outputs: dict[Any, Tensor] = {}

    def keep_output(number: int) -> Any:
        return lambda module, inputs, output: outputs.update({number: output})

    def change(site: Site, act: Tensor) -> Tensor:
        return act if act.requires_grad else act.detach().requires_grad_()

    handles = [down.register_forward_hook(keep_output(n)) for n, down in downs.items()]
    for number, ids in enumerate(ids_of):
        seen = Seen()
        outputs.clear()
        with torch.enable_grad(), all_experts(tiny, model, change, seen):
            total = len(ids) * log_p_of(own_logits(model, ids), ids, number)
            outputs.update({("experts", n): output for n, output in seen.output.items()})
            for name, grad in zip(
                outputs, torch.autograd.grad(total, list(outputs.values())), strict=True
            ):
                grads.setdefault(name, []).append(grad.reshape(-1, grad.shape[-1]))
        for site, act in seen.acts.items():
            weights = 1.0 if isinstance(site, int) else seen.weights[site[0]][:, site[1], None]
            acts[site].append((act * weights).detach())
            chosen = len(ids) if isinstance(site, int) else seen.chosen[site[0]][:, site[1]].sum()
            rows[site] += int(chosen)
    for handle in handles:
        handle.remove()
    costs = {}
    for site, width in widths.items():
        g = torch.cat(grads[site if isinstance(site, int) else ("experts", site[0])])
        weight = down_of(tiny, model, site).double()
        a = torch.cat(acts[site])
        gram = a.t() @ a / len(a)
        gram += ridge * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
        enough = isinstance(site, int) or rows[site] >= ROWS_A_NEURON * width
        costs[site] = greedy_costs(gram.inverse(), weight, g.t() @ g / len(g))
        costs[site] *= enough
    return costs
