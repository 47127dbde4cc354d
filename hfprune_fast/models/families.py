"""The model families: where each keeps its layers, gated MLP and head, and what becomes of outputs.

To add a family: one line in FAMILIES (its `model_type` and what differs from LLaMA);
docs/families.md lists the other steps. What can be found in a model is not declared here: shapes,
biases, kinds of layers, the activation, whether an MLP computes the plain formula.
"""

from __future__ import annotations

import re
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
    """

    runs_as: Mapping[str, str] = field(default_factory=dict)
    decoder: str = "model.language_model"
    stored: tuple[str, ...] = ("model.language_model.", "language_model.model.", "model.")
    stored_heads: tuple[str, ...] = ("lm_head", "language_model.lm_head")
    caps_logits: bool = False


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
    refused: Mapping[str, str] = field(default_factory=dict)


_FEED_FORWARD = Site("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")
_FUSED = Site("mlp.gate_up_proj", "mlp.gate_up_proj")
_NORM_BEHIND = Family(norm_behind="post_feedforward_layernorm", qk_norm=True)
_GEMMA = replace(_NORM_BEHIND, softcap="final_logit_softcapping")
_GRANITE = Family(logit_divisor="logits_scaling", output_scale="residual_multiplier")
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
            "enable_moe_block": "experts",
        },
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
    "qwen3_vl": Family(tower=Tower({"qwen3_vl_text": "qwen3"})),
    "smolvlm": Family(tower=_TEXT_MODEL),
}

_UNGATED = """apertus arcee bloom codegen falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj mpt nemotron
opt phi starcoder2"""
_EXPERTS = """deepseek_v2 deepseek_v3 glm4_moe gpt_oss granitemoe lfm2_moe mixtral olmoe
qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next"""
_OTHER_LOGITS = "aya_vision cohere2_vision"
_STATE = "deepseek_v4 gemma3n gemma3n_text glm5_next qwen4_exp"
# Families that are known and cannot be right yet, and why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(_UNGATED.split(), "its MLPs have no gate"),
    **dict.fromkeys(_EXPERTS.split(), "it has experts, each with neurons of its own"),
    **dict.fromkeys(_OTHER_LOGITS.split(), "its logits are not those of its text tower"),
    **dict.fromkeys(_STATE.split(), "its layers pass on more than one hidden state"),
}

NON_UNIFORM = "hfprune_"  # begins the model_type of a family whose layers have their own widths


@dataclass(frozen=True)
class Neurons:
    """Where a tensor of a checkpoint holds its layer's neurons."""

    layer: int
    axis: int
    times: int = 1  # how often each is there, one block after the other: 2 where gate and up are


def neurons_in(family: Family, tensor_name: str) -> Neurons | None:
    """Return where a tensor, named as below the decoder, holds neurons; None if it does not.

    down_proj's bias is not cut.
    """
    site, layers = family.site, re.escape(family.layers)
    rows = f"(?:{re.escape(site.gate)}|{re.escape(site.up)})"
    match = re.fullmatch(
        rf"{layers}\.(\d+)\.(?:({rows})\.(?:weight|bias)|({re.escape(site.down)})\.weight)",
        tensor_name,
    )
    if match is None:
        return None
    if match[3]:
        return Neurons(int(match[1]), 1)
    return Neurons(int(match[1]), 0, times=2 if site.gate == site.up else 1)
