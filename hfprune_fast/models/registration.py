"""The classes of `nonuniform`: known to transformers, and put on models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfprune_fast.models.families import FAMILIES, NON_UNIFORM, family_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    name = FAMILIES[family].class_name
    config = getattr(nonuniform, f"HFPrune{name}Config")
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for head, auto in heads_of(family).items():
        model = getattr(nonuniform, f"HFPrune{name}{head}")
        getattr(transformers, auto).register(config, model, exist_ok=True)
    nonuniform.tell_peft(config.model_type)
    return config, getattr(nonuniform, f"HFPrune{name}ForCausalLM")


def heads_of(family: str) -> dict[str, str]:
    """Return what a family's classes are called beyond its name, with their Auto classes."""
    import transformers

    from hfprune_fast.models.nonuniform import HEADS

    known = dir(transformers)  # unlike hasattr, it imports no model
    name = FAMILIES[family].class_name
    return {head: auto for head, auto in HEADS.items() if name + head in known}


def record_widths(model: PreTrainedModel, widths: Sequence[int]) -> None:
    """Write the widths of a pruned model's MLPs into its config, so that what it saves loads.

    A model of the family's own class gets the class of `nonuniform`, which computes the same, if
    the widths differ, and goes back if they do not. A model of any other class keeps it: if the
    widths differ, what it saves does not load, since the shapes do not fit.
    """
    import transformers

    config: Any = model.config
    family, uniform = family_type(config.to_dict()), len(set(widths)) == 1
    was_uniform = config.model_type == family
    config.intermediate_size = max(widths)
    vars(config).pop("mlp_widths", None)
    config.per_layer_config = None  # transformers' own, where it has built the model by it
    if not uniform:
        config.mlp_widths = list(widths)
    if uniform == was_uniform:  # the class fits already
        return
    name = FAMILIES[family].class_name
    own = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    if uniform:
        vars(config).pop("auto_map", None)
        config.__class__, model.__class__ = own
    elif (type(config), type(model)) == own:
        config.__class__, model.__class__ = nonuniform_classes(family)
