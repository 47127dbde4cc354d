"""The definition every score is held against: float64 torch, written out plainly.

Llama, Mistral, Qwen2 and Qwen3 share one skeleton; a bias or a per-head norm is applied wherever
its tensor exists. The loss of a sequence is the mean over its positions of H(softmax(logits)), in
nats; a is the input of down_proj, g = dloss/da, x = g * a. Shapes: N sequences, S positions,
D hidden_size, F intermediate_size, V vocab_size, L layers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # those that are written out here


@dataclass(frozen=True)
class Forward:
    logits: Tensor  # (S, V)
    acts: list[Tensor]  # L of (S, F); they are where the autograd graph starts


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * h / torch.sqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)


def linear(weights: Mapping[str, Tensor], name: str, h: Tensor) -> Tensor:
    y = h @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def rotary_angles(config: Any, n_positions: int, head_dim: int) -> Tensor:
    """Angle of pair i at position p: p * theta^(-2i / head_dim), as (S, head_dim // 2)."""
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"truth knows the default rope only, got {rope['rope_type']!r}")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return torch.outer(
        torch.arange(n_positions, dtype=torch.float64), rope["rope_theta"] ** (-pairs / head_dim)
    )


def rotate(h: Tensor, angles: Tensor) -> Tensor:
    """Turns the pair (h_i, h_{i + head_dim/2}) of each head, (heads, S, head_dim), by its angle."""
    first, second = h.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def visible_keys(config: Any, layer: int, n_positions: int) -> Tensor:
    """(S, S) bool, query by key: the past and itself, at most sliding_window of them."""
    positions = torch.arange(n_positions)
    distance = positions[:, None] - positions[None, :]
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] == "full_attention":
        window = None
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attention(weights: Mapping[str, Tensor], config: Any, layer: int, h: Tensor) -> Tensor:
    name = f"model.layers.{layer}.self_attn"
    n_positions, n_heads = len(h), config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    angles = rotary_angles(config, n_positions, head_dim)

    def heads(projection: str) -> Tensor:
        return linear(weights, f"{name}.{projection}", h).view(n_positions, -1, head_dim)

    query, key, value = heads("q_proj"), heads("k_proj"), heads("v_proj")
    if f"{name}.q_norm.weight" in weights:
        query = rms_norm(query, weights[f"{name}.q_norm.weight"], config.rms_norm_eps)
        key = rms_norm(key, weights[f"{name}.k_norm.weight"], config.rms_norm_eps)
    query = rotate(query.transpose(0, 1), angles)
    key = rotate(key.transpose(0, 1), angles)
    value = value.transpose(0, 1)
    # Key head i serves the query heads i * group .. (i + 1) * group - 1.
    group = n_heads // config.num_key_value_heads
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)

    similarity = query @ key.transpose(1, 2) / math.sqrt(head_dim)
    similarity = similarity.masked_fill(~visible_keys(config, layer, n_positions), -math.inf)
    mixed = torch.softmax(similarity, dim=-1) @ value
    return linear(weights, f"{name}.o_proj", mixed.transpose(0, 1).reshape(n_positions, -1))


def forward(
    state_dict: Mapping[str, Tensor], config: Any, ids: Tensor, *, alive: Tensor | None = None
) -> Forward:
    """Runs one sequence, ids (S,) int64.

    alive multiplies the acts: (L, F) bool removes neurons, (L, S, F) factors scale single acts.
    torch.autograd.grad(f(logits), acts) is the total derivative, through all later layers.
    """
    if config.hidden_act != "silu":
        raise ValueError(f"truth knows silu only, got hidden_act={config.hidden_act!r}")
    weights = {name: tensor.detach().double() for name, tensor in state_dict.items()}
    eps = config.rms_norm_eps
    hidden = weights["model.embed_tokens.weight"][ids]
    acts: list[Tensor] = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        h = rms_norm(hidden, weights[f"{name}.input_layernorm.weight"], eps)
        hidden = hidden + attention(weights, config, layer, h)
        h = rms_norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], eps)
        gate = linear(weights, f"{name}.mlp.gate_proj", h)
        act = gate * torch.sigmoid(gate) * linear(weights, f"{name}.mlp.up_proj", h)
        if alive is not None:
            act = act * alive[layer]
        if layer == 0:
            act.requires_grad_()  # the first leaf; the later acts hang below it
        acts.append(act)
        hidden = hidden + linear(weights, f"{name}.mlp.down_proj", act)
    tied = config.tie_word_embeddings
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return Forward(rms_norm(hidden, weights["model.norm.weight"], eps) @ head.T, acts)


def entropy(logits: Tensor) -> Tensor:
    """H = -sum p log p of each row, (S, V) -> (S,) nats, with 0 log 0 = 0."""
    log_p = torch.log_softmax(logits.double(), dim=-1)
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim=-1)


def kl_nats(dense_logits: Tensor, pruned_logits: Tensor) -> Tensor:
    """KL(dense || pruned) = sum p (log p - log q) of each row, (S, V) twice -> (S,) nats."""
    log_p = torch.log_softmax(dense_logits.double(), dim=-1)
    log_q = torch.log_softmax(pruned_logits.double(), dim=-1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(dim=-1)


def scores(
    state_dict: Mapping[str, Tensor],
    config: Any,
    sequences: Tensor,
    loss_of: Callable[[Tensor, Tensor, int], Tensor] = lambda logits, ids, n: entropy(
        logits
    ).mean(),
) -> dict[str, Tensor]:
    """The statistics l1, l2, mask, act, each (L, F), and "loss" (N,), of sequences (N, S).

    loss_of is given the logits and ids of a sequence, and its number.
    """
    weights = {name: tensor.detach().double() for name, tensor in state_dict.items()}
    losses, per_sequence = [], []
    for number, ids in enumerate(sequences):
        run = forward(weights, config, ids)
        loss = loss_of(run.logits, ids, number)
        grads = torch.stack(torch.autograd.grad(loss, run.acts))  # (L, S, F)
        acts = torch.stack(run.acts).detach()
        x = grads * acts
        l1, l2 = x.abs().sum(dim=1), x.pow(2).sum(dim=1)
        per_sequence.append(torch.stack((l1, l2, x.sum(dim=1).pow(2), acts.pow(2).sum(dim=1))))
        losses.append(loss.detach())
    l1, l2, mask, act = torch.stack(per_sequence).sum(dim=0)
    return {"l1": l1, "l2": l2, "fisher_mask": mask, "act": act, "loss": torch.stack(losses)}


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    tied: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """A small random transformers model; family is llama, mistral, qwen2 or qwen3.

    Every parameter is random (transformers starts biases at 0 and norms at 1, which would hide
    them), the same for every dtype up to its rounding, and large enough that the outputs are
    peaked and depend on the acts.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "vocab_size": 127,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "qwen3":
        sizes["head_dim"] = 24  # 4 heads of 24 are not hidden_size: nothing may assume they are
    config = AutoConfig.for_model(family, tie_word_embeddings=tied, **(sizes | overrides))
    # from_config(dtype=...) keeps the rotary inv_freq in fp32; model.to(bf16) would round it.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1:
            parameter.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise)
        else:
            gain = 2.5 if "embed_tokens" in name or "lm_head" in name else 1.2
            parameter.copy_(noise * gain / math.sqrt(parameter.shape[1]))
    return model
