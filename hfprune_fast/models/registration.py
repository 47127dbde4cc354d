"""The classes of `nonuniform`: known to transformers, and put on models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from hfprune_fast.models.declared import family_of, family_type
from hfprune_fast.models.families import FAMILIES, NON_UNIFORM
from hfprune_fast.models.kept import KeptExperts, size_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT = {
    "AutoModel": "MODEL",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION",
}
_WITH_TOWER = {
    "AutoModel": "MODEL",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
}


def register_with_transformers() -> None:
    """Register the config classes of `nonuniform`, so that its models load without remote code.

    Importing a family's classes takes seconds, so placeholders are registered. AutoConfig makes
    an instance of one before any model is loaded; that imports and registers the classes.
    """
    # transformers replaces its module in sys.modules when it has been imported. If another thread
    # is importing it, this line waits and may get the old module; the next gets the new one.
    import transformers  # noqa: F401
    from transformers import AutoConfig, PreTrainedConfig

    class Placeholder(PreTrainedConfig):
        def __new__(cls, **fields: Any) -> Any:
            config_class, _ = nonuniform_classes(cls.model_type.removeprefix(NON_UNIFORM))
            return config_class(**fields)

    for family in FAMILIES:
        model_type = NON_UNIFORM + family
        placeholder = type("Placeholder", (Placeholder,), {"model_type": model_type})
        AutoConfig.register(model_type, placeholder, exist_ok=True)


def nonuniform_classes(family: str) -> tuple[Any, Any]:
    """Return the config and model class of `nonuniform` for a family, registered."""
    import transformers

    from hfprune_fast.models import nonuniform

    classes = class_names(family)
    config = getattr(nonuniform, f"HFPrune{classes['AutoConfig']}")
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, name in classes.items():
        if auto != "AutoConfig":
            model = getattr(nonuniform, f"HFPrune{name}")
            getattr(transformers, auto).register(config, model, exist_ok=True)
    nonuniform.tell_peft(config.model_type)
    return config, getattr(nonuniform, f"HFPrune{main_class(family)}")


def class_names(family: str) -> dict[str, str]:
    """Return the names of transformers' classes for a family, by the Auto class of each."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = {"AutoConfig": CONFIG_MAPPING[family].__name__}
    for auto, mapping in (_TEXT if FAMILIES[family].tower is None else _WITH_TOWER).items():
        found[auto] = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(family)
    return {auto: name for auto, name in found.items() if name is not None}


def main_class(family: str) -> str:
    """Return the name of transformers' class of a family's whole model, with its language head."""
    auto = "ForCausalLM" if FAMILIES[family].tower is None else "ForImageTextToText"
    return class_names(family)[f"AutoModel{auto}"]


def config_defaults(family: str) -> dict[str, Any]:
    """Return what the config class of a family has where config.json says nothing."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return {f.name: f.default for f in fields(CONFIG_MAPPING[family]) if f.default is not MISSING}


def record_widths(
    model: PreTrainedModel, widths: Sequence[int], experts: KeptExperts | None = None
) -> None:
    """Write the widths of a pruned model's MLPs into its config, so that what it saves loads.

    Args:
        experts: what a model keeps that has any; then `widths` is not used.

    A model of the family's own class gets the class of `nonuniform`, which computes the same, if
    the widths differ, and goes back if they do not. A model of any other class keeps it: if the
    widths differ, what it saves does not load, since the shapes do not fit.
    """
    import transformers

    config: Any = model.config
    declared = config.to_dict()
    of_text, family, uniform = family_of(declared), family_type(declared), len(set(widths)) == 1
    was_uniform = config.model_type == family
    text: Any = config if of_text.tower is None else config.text_config
    if experts is not None:
        for key, value in size_keys(of_text, experts, text.to_dict().keys()).items():
            setattr(text, key, value)
        return
    setattr(text, of_text.width, max(widths))
    for key, value in of_text.with_width.items():
        if value is not None:
            setattr(text, key, value)
    vars(config).pop("mlp_widths", None)
    if not of_text.own_layers:
        config.per_layer_config = None  # transformers' own, where it has built the model by it
    if not uniform:
        config.mlp_widths = list(widths)
    if uniform == was_uniform:  # the class fits already
        return
    names = class_names(family)["AutoConfig"], main_class(family)
    own = tuple(getattr(transformers, name) for name in names)
    if uniform:
        vars(config).pop("auto_map", None)
        config.__class__, model.__class__ = own
    elif (type(config), type(model)) == own:
        config.__class__, model.__class__ = nonuniform_classes(family)
