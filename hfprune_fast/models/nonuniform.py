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

# The layers of a gated MLP: what reads the hidden states (gate and up, or both in one), and what
# reads the neurons.
_READ_HIDDEN = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "input_linear")
_READ_NEURONS = ("down_proj", "w2", "output_linear")
_CLASSES: dict[str, type] = {}  # the classes made so far


def __getattr__(name: str) -> Any:
    """Return HFPruneLlamaConfig, HFPruneLlamaForCausalLM, or the same for any other class.

    Each class is made of transformers' own (LlamaConfig, LlamaForCausalLM) when it is first used:
    this file needs no list of families, and imports only the families that are used.
    """
    match = re.fullmatch("HFPrune([A-Z]\\w+)", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _CLASSES:
        return _CLASSES[name]
    base = getattr(transformers, match[1])
    members: dict[str, Any] = {"__module__": __name__, "__qualname__": name}
    if name.endswith("Config"):
        bases: tuple[type, ...] = (base,)
        members |= {
            "model_type": f"hfprune_{base.model_type}",
            "_auto_class": "AutoConfig",  # has save_pretrained ship this file
            "mlp_widths": None,
            "__annotations__": {"mlp_widths": list[int] | None},  # a field of the config
        }
        if _declares_widths(base):
            members |= {
                "per_layer_config": property(_LayerConfigs, _keep_declared),
                "to_dict": lambda self: {**_declaration(self.mlp_widths), **base.to_dict(self)},
            }
    else:
        bases = (_PerLayerWidths, base)
        members["config_class"] = __getattr__(f"HFPrune{base.config_class.__name__}")
        members["_auto_class"] = _auto_class(base)
    # Two threads may both have made the class; both return the one that was stored first.
    made = _CLASSES.setdefault(name, type(name, bases, members))
    of_family, _, head = base.__name__.partition("For")
    _convert_alike(base.__name__, name)
    if name.endswith("Config"):
        _convert_alike(base.model_type, made.model_type)  # type: ignore[attr-defined]
    elif name.endswith("Model"):
        transformers.AutoModel.register(made.config_class, made, exist_ok=True)  # type: ignore[attr-defined]
    elif head not in ("CausalLM", "ConditionalGeneration"):  # they make it by AutoModel
        __getattr__(f"HFPrune{of_family}Model")
    return made


def _auto_class(base: type) -> str:
    """Return the name of the Auto class that loads a model's class."""
    _, split, head = base.__name__.partition("For")
    head = "ImageTextToText" if head == "ConditionalGeneration" else head
    return f"AutoModelFor{head}" if split else "AutoModel"


def _declares_widths(base: type) -> bool:
    """Return whether `per_layer_config` says a family's widths: where it says nothing else."""
    config = base()
    own = getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_overrides", None)
    others = hasattr(config, "text_config") or hasattr(config, "shared_intermediate_size")
    return not own and not others


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
        text: Any = getattr(config, "text_config", None) or config
        widths, layers = config.mlp_widths, text.num_hidden_layers
        widest = getattr(text, "shared_intermediate_size", None) or text.intermediate_size
        if widths is None:
            widths = [widest] * layers
        if len(widths) != layers or not 1 <= min(widths) <= max(widths) <= widest:
            raise ValueError(
                f"mlp_widths must have a width in 1..{widest} for each of the "
                f"{layers} layers, got {widths}"
            )
        if isinstance(vars(type(config)).get("per_layer_config"), property):
            _follow_widths(config, widths)
        read_rope_parameters(config)
        super().__init__(config)  # type: ignore[call-arg]
        tell_peft(config.model_type)
        decoder: Any = self
        for name in ("model", "language_model", "text_model"):
            decoder = getattr(decoder, name, decoder)
            if decoder is not self and isinstance(decoder, _PerLayerWidths):
                return  # it has narrowed its layers
        for layer, width in zip(decoder.layers, widths, strict=True):
            _narrow(layer, widest, width)
        self.post_init()  # type: ignore[attr-defined]  # initialises the new weights

    @classmethod
    def is_custom_code(cls) -> bool:
        """Have transformers treat the family's layers as its own: it initialises others less."""
        return False


def _follow_widths(config: Any, widths: list[int]) -> None:
    """Have a config's `per_layer_config` follow its widths, or refuse one that says others."""
    declared = {"per_layer_config": vars(config).get("per_layer_config")}
    if declared["per_layer_config"] is not None and declared != _declaration(widths):
        raise ValueError(
            "per_layer_config and mlp_widths must say the same widths, got "
            f"{declared['per_layer_config']} and {config.mlp_widths}; delete per_layer_config "
            "from config.json if mlp_widths is right"
        )
    config.per_layer_config = None


def _narrow(layer: Any, widest: int, width: int) -> None:
    """Give the MLP of a layer, which is `widest` wide, linear layers of this width."""
    for module in list(layer.modules()):
        for name in _READ_NEURONS:
            down = module._modules.get(name)
            if down is None or down.in_features == width:
                continue
            module._modules[name] = _resized(down, width, down.out_features)
            for other in _READ_HIDDEN:
                up = module._modules.get(other)
                if up is not None:
                    out = up.out_features // widest * width
                    module._modules[other] = _resized(up, up.in_features, out)
            if hasattr(module, "intermediate_size"):
                module.intermediate_size = width


def _resized(linear: Any, inside: int, out: int) -> Any:
    """Return a linear layer like this one, of another size."""
    like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
    return type(linear)(inside, out, bias=linear.bias is not None, **like)


def read_rope_parameters(config: Any) -> None:
    """Give transformers 4 the rotary parameters as transformers 5 saves them, which it ignores."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope and hasattr(config, "rope_theta"):  # which configs of transformers 5 have not
        config.rope_theta = rope.pop("rope_theta", config.rope_theta)
        config.rope_scaling = None if rope.get("rope_type", "default") == "default" else rope


def _convert_alike(name: str, ours: str) -> None:
    """Have transformers 5 convert the tensors of files as it does for a class or model_type."""
    try:
        from transformers import conversion_mapping
    except ImportError:
        return
    known = conversion_mapping.get_checkpoint_conversion_mapping(name)
    if known is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(ours, known, overwrite=True)


def tell_peft(model_type: str) -> None:
    """Give peft, where it is imported, the family's target modules for ours."""
    constants = getattr(sys.modules.get("peft.utils"), "constants", None)
    for name, mapping in vars(constants).items() if constants else ():
        if name.endswith("_MODULES_MAPPING") and isinstance(mapping, dict):
            family = mapping.get(model_type.removeprefix("hfprune_"))
            if family is not None:
                mapping.setdefault(model_type, family)
