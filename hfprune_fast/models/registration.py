"""Make the classes of `nonuniform` known to transformers."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from hfprune_fast.models.families import CLASS_NAMES

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Make the classes of `nonuniform` known to transformers, so that no remote code is needed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hfprune_fast.models import nonuniform

    for name in CLASS_NAMES.values():
        config = getattr(nonuniform, f"HFPrune{name}Config")
        model = getattr(nonuniform, f"HFPrune{name}ForCausalLM")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def register_with_transformers() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if _AUTO_CLASSES in sys.modules:
        register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Registers when AutoModelForCausalLM is first imported: importing transformers takes long."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
