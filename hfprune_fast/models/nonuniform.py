"""Models whose layers have MLPs of different widths: a family's own classes with narrower MLPs.

hfprune_fast puts a copy of this file into such a checkpoint as `modeling_hfprune.py`, from where
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it. So it imports
nothing but transformers. After `import hfprune_fast` the same classes need no remote code.

config.json has the width of each layer in `mlp_widths`; `intermediate_size` is the widest. The
`model_type` is not the family's, so that nothing takes the checkpoint for a uniform one. The same
widths stand in `per_layer_config`, transformers' own notation, which 4.57 has not and 5.17 has.
"""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import transformers

# What a family's classes are called beyond its name, and the Auto class of each.
HEADS = {
    "Model": "AutoModel",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
_CLASSES: dict[str, type] = {}  # the classes made so far


def __getattr__(name: str) -> Any:
    """Return HFPruneLlamaConfig, HFPruneLlamaForCausalLM, or the same for any other family or head.

    Each class is made of transformers' own (LlamaConfig, LlamaForCausalLM) when it is first used:
    this file needs no list of families, and imports only the families that are used.
    """
    match = re.fullmatch(f"HFPrune(.+?)(Config|{'|'.join(HEADS)})", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _CLASSES:
        return _CLASSES[name]
    family, kind = match.groups()
    base = getattr(transformers, family + kind)
    members: dict[str, Any] = {"__module__": __name__, "__qualname__": name}
    if kind == "Config":
        bases: tuple[type, ...] = (base,)
        members |= {
            "model_type": f"hfprune_{base.model_type}",
            "_auto_class": "AutoConfig",  # has save_pretrained ship this file
            "mlp_widths": None,
            "__annotations__": {"mlp_widths": list[int] | None},  # a field of the config
            "per_layer_config": property(_LayerConfigs, _keep_declared),
            "to_dict": lambda self: {**_declaration(self.mlp_widths), **base.to_dict(self)},
        }
    else:
        bases = (_PerLayerWidths, base)
        members["config_class"] = __getattr__(f"HFPrune{family}Config")
        members["_auto_class"] = HEADS[kind]
    # Two threads may both have made the class; both return the one that was stored first.
    made = _CLASSES.setdefault(name, type(name, bases, members))
    if kind == "Model":  # heads of transformers make their decoder by AutoModel
        transformers.AutoModel.register(made.config_class, made, exist_ok=True)  # type: ignore[attr-defined]
    elif kind != "Config":
        __getattr__(f"HFPrune{family}Model")
    return made


class _LayerConfigs(list[Any]):
    """What `per_layer_config` of a config returns: for each layer a config with its width.

    transformers has this attribute, but if it is given one with different widths, it refuses to
    return `intermediate_size`, which its classes of these families read. So it is not given any;
    classes that build each layer by `config.per_layer_config[i]` find the width here.
    """

    def __init__(self, config: Any) -> None:
        for width in config.mlp_widths or [config.intermediate_size] * config.num_hidden_layers:
            layer = copy.copy(config)
            layer.intermediate_size, layer.mlp_widths = width, None
            self.append(layer)
        self._config = config

    def __getitem__(self, key: Any) -> Any:
        """Return the config of a layer, or of a type of layers, which differ in nothing else."""
        return self._config if isinstance(key, str) else super().__getitem__(key)


def _keep_declared(config: Any, declared: Any) -> None:
    """Keep what config.json declares until a model is built, which compares it with the widths."""
    vars(config).pop("per_layer_config", None)
    if declared is not None:
        vars(config)["per_layer_config"] = declared


def _declaration(widths: list[int] | None) -> dict[str, Any]:
    """Return what config.json says of widths beside `mlp_widths`."""
    if widths is None:
        return {}
    layers = {str(i): {"intermediate_size": width} for i, width in enumerate(widths)}
    return {"per_layer_config": layers}


class _PerLayerWidths:
    """Mixin for a family's models that gives each layer's MLP its own width."""

    def __init__(self, config: Any) -> None:
        widths, widest = config.mlp_widths, config.intermediate_size
        if widths is None:
            widths = [widest] * config.num_hidden_layers
        if len(widths) != config.num_hidden_layers or not 1 <= min(widths) <= max(widths) <= widest:
            raise ValueError(
                f"mlp_widths must have a width in 1..{widest} for each of the "
                f"{config.num_hidden_layers} layers, got {widths}"
            )
        declared = {"per_layer_config": vars(config).get("per_layer_config")}
        if declared["per_layer_config"] is not None and declared != _declaration(widths):
            raise ValueError(
                "per_layer_config and mlp_widths must say the same widths, got "
                f"{declared['per_layer_config']} and {config.mlp_widths}; delete per_layer_config "
                "from config.json if mlp_widths is right"
            )
        config.per_layer_config = None  # it follows mlp_widths from here on
        read_rope_parameters(config)
        super().__init__(config)  # type: ignore[call-arg]
        tell_peft(config.model_type)
        below: Any = getattr(self, "model", None)
        if isinstance(below, _PerLayerWidths):
            return
        decoder: Any = self if below is None else below
        for layer, own in zip(decoder.layers, _LayerConfigs(config), strict=True):
            if layer.mlp.up_proj.out_features != own.intermediate_size:
                layer.mlp = type(layer.mlp)(own)
        self.post_init()  # type: ignore[attr-defined]  # initialises the new weights


def read_rope_parameters(config: Any) -> None:
    """Give transformers 4 the rotary parameters as transformers 5 saves them, which it ignores."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope and hasattr(config, "rope_theta"):  # which configs of transformers 5 have not
        config.rope_theta = rope.pop("rope_theta", config.rope_theta)
        config.rope_scaling = None if rope.get("rope_type", "default") == "default" else rope


def tell_peft(model_type: str) -> None:
    """Give peft, where it is imported, the family's target modules for ours."""
    constants = getattr(sys.modules.get("peft.utils"), "constants", None)
    for name, mapping in vars(constants).items() if constants else ():
        if name.endswith("_MODULES_MAPPING") and isinstance(mapping, dict):
            family = mapping.get(model_type.removeprefix("hfprune_"))
            if family is not None:
                mapping.setdefault(model_type, family)
