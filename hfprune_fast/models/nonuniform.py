"""Models whose layers have MLPs of different widths: a family's own classes with narrower MLPs.

hfprune_fast puts a copy of this file into such a checkpoint as `modeling_hfprune.py`, from where
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it. So it imports
nothing but transformers. After `import hfprune_fast` the same classes need no remote code.

config.json has the width of each layer in `mlp_widths`; `intermediate_size` is the widest. The
`model_type` is not the family's, so that nothing takes the checkpoint for a uniform one.
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
        super().__init__(config)  # type: ignore[call-arg]
        tell_peft(config.model_type)
        below: Any = getattr(self, "model", None)
        if isinstance(below, _PerLayerWidths):
            return
        decoder: Any = self if below is None else below
        for layer, width in zip(decoder.layers, widths, strict=True):
            if width != widest:
                narrow = copy.copy(config)
                narrow.intermediate_size = width
                layer.mlp = type(layer.mlp)(narrow)
        self.post_init()  # type: ignore[attr-defined]  # initialises the new weights


def tell_peft(model_type: str) -> None:
    """Give peft, where it is imported, the family's target modules for ours."""
    constants = getattr(sys.modules.get("peft.utils"), "constants", None)
    for name, mapping in vars(constants).items() if constants else ():
        if name.endswith("_MODULES_MAPPING") and isinstance(mapping, dict):
            family = mapping.get(model_type.removeprefix("hfprune_"))
            if family is not None:
                mapping.setdefault(model_type, family)
