"""The model families: where each keeps its layers, gated MLP and head, and what becomes of outputs.

To add a family: one line in FAMILIES (its `model_type` and what differs from LLaMA);
docs/families.md lists the other steps. What can be found in a model is not declared here: shapes,
biases, kinds of layers, the activation, whether an MLP computes the plain formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Site:
    """The linear layers of a gated MLP, down(act_fn(gate(x)) * up(x)), as paths below a layer.

    Where `gate` and `up` are one path, its rows are gate's and then up's.
    """

    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, what chooses among them, and the MLP beside them.

    Paths are below a layer, keys of config.json. A layer without the module at `path` has only the
    family's own MLP.

    Args:
        path: the module of all experts, whose parameters gate_up_proj and down_proj are 3-D.
        per_expert: the router's tensors that hold an entry for each expert, along the first axis;
            not every model has all.
        stored: what an expert's gate, up and down are called below `path.NUMBER.` in files that
            hold each apart; files may also hold the parameters as they are.
        transposed: the parameters' last two axes are the other way round, and the columns of
            gate_up_proj are a neuron's gate, its up, and then the next neuron's.
        across: files may hold the parameters with their last two axes swapped; shapes tell.
        count, width, chosen: the number of experts, their neurons, and how many a token chooses.
        groups: the number of groups that a token's experts are chosen from.
        enabled: without this key, or where it is false, there are none.
        shared: the MLP beside the experts, which sees every token.
        shared_width: the key of its width; without one it is a multiple of the experts'.
        shared_gate: the linear layer whose sigmoid its output is multiplied by.
    """

    path: str = "mlp.experts"
    per_expert: tuple[str, ...] = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
    stored: tuple[str, str, str] = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    transposed: bool = False
    across: bool = False
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    chosen: str = "num_experts_per_tok"
    groups: str = ""
    enabled: str = ""
    shared: Site | None = None
    shared_width: str = ""
    shared_gate: str = ""


@dataclass(frozen=True)
class Tower:
    """The text tower of a model that has others, such as vision, which are copied as they are.

    The tower runs as the causal language model that computes the same for text.

    Args:
        runs_as: {model_type of the text's config: model_type to run as}, if these differ.
        decoder: its path in the whole model.
        stored: how the names of its tensors may begin in files, where those of the model that is
            run begin with `model.`; the first that fits.
        stored_heads: what its head may be called in files.
        caps_logits: the whole model scales and caps its logits as the tower alone does.
        sets: keys of the text's config whose value the whole model's class does not ask for.
        across: `Experts.across`.
    """

    runs_as: Mapping[str, str] = field(default_factory=dict)
    decoder: str = "model.language_model"
    stored: tuple[str, ...] = ("model.language_model.", "language_model.model.", "model.")
    stored_heads: tuple[str, ...] = ("lm_head", "language_model.lm_head")
    caps_logits: bool = False
    sets: Mapping[str, Any] = field(default_factory=dict)
    across: bool = False


@dataclass(frozen=True)
class Family:
    """Names of the parts, as paths below the base model (`decoder`), and keys of config.json.

    Args:
        width: the key of the MLP's width.
        logit_scale, logit_divisor, softcap: keys of what logits are multiplied by, divided by and
            capped with, in this order.
        norm_behind: the RMS norm that the MLP's output goes through before it is added to the
            residual stream, as a path below a layer. Nothing else may stand between.
        output_scale: what the output is multiplied by when it is added: an attribute, as a path
            below a layer.
        with_width: other keys of config.json that are set when `width` is; None deletes a key.
        own_layers: its per_layer_config says other things than widths, and is left alone.
        qk_norm: q and k are normalised, which takes memory.
        tower: it has a text tower, which is what is scored and cut.
        experts: its layers, or some of them, have experts.
        renamed: {part of a name below a layer: what stands there in files}.
        refused: {key: what is not supported where its value is neither false, null nor 0}.
    """

    site: Site = Site()
    decoder: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    head: str = "lm_head"
    width: str = "intermediate_size"
    logit_scale: str = ""
    logit_divisor: str = ""
    softcap: str = ""
    norm_behind: str = ""
    output_scale: str = ""
    with_width: Mapping[str, Any] = field(default_factory=dict)
    own_layers: bool = False
    qk_norm: bool = False
    tower: Tower | None = None
    experts: Experts | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def _mlp_at(path: str) -> Site:
    return Site(f"{path}.gate_proj", f"{path}.up_proj", f"{path}.down_proj")


_FEED_FORWARD = _mlp_at("feed_forward")
_FUSED = Site("mlp.gate_up_proj", "mlp.gate_up_proj")
_NORM_BEHIND = Family(norm_behind="post_feedforward_layernorm", qk_norm=True)
_GEMMA = replace(_NORM_BEHIND, softcap="final_logit_softcapping")
_GRANITE = Family(logit_divisor="logits_scaling", output_scale="residual_multiplier")
_QWEN_EXPERTS = Experts(
    shared=_mlp_at("mlp.shared_expert"),
    shared_width="shared_expert_intermediate_size",
    shared_gate="mlp.shared_expert_gate",
)
_SHARED_EXPERTS = Experts(
    count="n_routed_experts", groups="n_group", shared=_mlp_at("mlp.shared_experts")
)
_TEXT_MODEL = Tower(decoder="model.text_model", stored=("model.text_model.",))

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm=True),
    "cwm": Family(),
    "diffllama": Family(),
    "ernie4_5": Family(),
    "gemma": Family(),
    "helium": Family(),
    "hunyuan_v1_dense": Family(qk_norm=True),
    "ministral": Family(),
    "ministral3": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
    # A norm without a weight, or with a bias.
    "olmo": Family(),
    "stablelm": Family(qk_norm=True),
    # gate and up in one tensor.
    "glm": Family(_FUSED),
    "glm4": Family(_FUSED, norm_behind="post_mlp_layernorm"),
    "phi3": Family(_FUSED),
    # Logits scaled or capped; a norm behind the MLP.
    "cohere": Family(logit_scale="logit_scale", qk_norm=True),
    "cohere2": Family(logit_scale="logit_scale"),
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "hyperclovax": Family(
        logit_scale="logits_scaling",
        norm_behind="post_norm2",
        output_scale="residual_multiplier",
    ),
    "minicpm3": Family(logit_divisor="logits_scaling", output_scale="residual_scale"),
    "vaultgemma": Family(softcap="final_logit_softcapping"),
    "gemma2": replace(_GEMMA, qk_norm=False),
    "gemma3_text": _GEMMA,
    "gemma4_text": replace(
        _GEMMA,
        output_scale="layer_scalar",
        own_layers=True,
        refused={
            "num_kv_shared_layers": "layers that share keys and values with others",
            "hidden_size_per_layer_input": "an embedding for each layer (E2B, E4B)",
        },
        experts=Experts(
            "experts",
            ("router.proj.weight", "router.per_expert_scale"),
            chosen="top_k_experts",
            enabled="enable_moe_block",
            shared=Site(),
            shared_width="intermediate_size",
        ),
    ),
    "olmo2": _NORM_BEHIND,
    "olmo3": _NORM_BEHIND,
    "exaone4": _NORM_BEHIND,
    # Layers of several kinds: convolution, linear attention, state-space.
    "bamba": Family(_FEED_FORWARD, norm="final_layernorm"),
    "falcon_h1": Family(
        _FEED_FORWARD,
        norm="final_layernorm",
        logit_scale="lm_head_multiplier",
        output_scale="feed_forward.down_multiplier",
    ),
    "granitemoehybrid": replace(
        _GRANITE,
        site=Site("shared_mlp.input_linear", "shared_mlp.input_linear", "shared_mlp.output_linear"),
        width="shared_intermediate_size",
        refused={"num_local_experts": "experts"},
    ),
    "lfm2": Family(
        Site("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        norm="embedding_norm",
        with_width={"block_auto_adjust_ff_dim": False, "block_ff_dim": None},
        qk_norm=True,
    ),
    "qwen3_5_text": Family(qk_norm=True),
    # Layers with experts.
    "mixtral": Family(
        width="intermediate_size",
        experts=Experts(
            stored=("w1.weight", "w3.weight", "w2.weight"),
            count="num_local_experts",
            width="intermediate_size",
        ),
        renamed={"mlp.": "block_sparse_moe."},
    ),
    "qwen2_moe": Family(experts=_QWEN_EXPERTS),
    "qwen3_moe": Family(qk_norm=True, experts=Experts()),
    "olmoe": Family(qk_norm=True, experts=Experts(width="intermediate_size")),
    "gpt_oss": Family(
        experts=Experts(
            per_expert=("mlp.router.weight", "mlp.router.bias"),
            transposed=True,
            count="num_local_experts",
            width="intermediate_size",
        )
    ),
    "granitemoe": replace(
        _GRANITE,
        experts=Experts(
            "block_sparse_moe.experts",
            ("block_sparse_moe.router.weight",),
            count="num_local_experts",
            width="intermediate_size",
        ),
        renamed={
            "experts.gate_up_proj": "input_linear.weight",
            "experts.down_proj": "output_linear.weight",
            "router.weight": "router.layer.weight",
        },
    ),
    "qwen3_next": Family(qk_norm=True, experts=_QWEN_EXPERTS),
    "qwen3_5_moe_text": Family(qk_norm=True, experts=_QWEN_EXPERTS),
    "glm4_moe": Family(qk_norm=True, experts=_SHARED_EXPERTS),
    "deepseek_v3": Family(experts=_SHARED_EXPERTS),
    # Models with a text tower.
    "exaone4_5": Family(tower=Tower()),
    "gemma3": Family(tower=Tower()),
    "gemma4": Family(tower=Tower(caps_logits=True)),
    "idefics3": Family(tower=_TEXT_MODEL),
    "internvl": Family(tower=Tower()),
    "llava": Family(tower=Tower()),
    "llava_next": Family(tower=Tower()),
    "llava_onevision": Family(tower=Tower()),
    "mistral3": Family(tower=Tower()),
    "lfm2_vl": Family(tower=Tower()),
    "qwen2_vl": Family(tower=Tower({"qwen2_vl_text": "qwen2", "qwen2_vl": "qwen2"})),
    "qwen2_5_vl": Family(tower=Tower({"qwen2_5_vl_text": "qwen2", "qwen2_5_vl": "qwen2"})),
    "qwen3_5": Family(tower=Tower()),
    "qwen3_5_moe": Family(tower=Tower()),
    "qwen3_vl": Family(tower=Tower({"qwen3_vl_text": "qwen3"})),
    "qwen3_vl_moe": Family(
        tower=Tower({"qwen3_vl_moe_text": "qwen3_moe"}, sets={"norm_topk_prob": True}, across=True)
    ),
    "smolvlm": Family(tower=_TEXT_MODEL),
}

NON_UNIFORM = "hfprune_"  # begins the model_type of a family whose layers have their own widths
