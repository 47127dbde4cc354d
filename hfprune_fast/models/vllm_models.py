"""Models whose layers have MLPs of different widths, in vLLM's own code for their families.

vLLM finds `register` by the entry point `vllm.general_plugins`, in each of its processes. Nothing
else of hfprune_fast imports this file, and it imports vllm where it is used.

Each class is vLLM's own (LlamaForCausalLM) and reads `mlp_widths` while it makes its layers, so
kernels, quantisation, LoRA and parallelism are vLLM's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from hfprune_fast.models.families import FAMILIES, Site
from hfprune_fast.models.registration import main_class, register_with_transformers


def register() -> None:
    """Make the model types of `nonuniform` known to vLLM."""
    from vllm import ModelRegistry

    register_with_transformers()
    known = ModelRegistry.get_supported_archs()
    for model_type, family in FAMILIES.items():
        if family.tower is not None or family.site.down != Site().down or family.own_layers:
            continue  # it would have to be told of its widths in another way
        name = main_class(model_type)
        if name in known:
            ModelRegistry.register_model(f"HFPrune{name}", f"{__name__}:HFPrune{name}")


def __getattr__(name: str) -> Any:
    """Return HFPruneLlamaForCausalLM, or the same for any other family of vLLM's."""
    match = re.fullmatch("HFPrune(.+ForCausalLM)", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _narrow(name, match[1])


def check_parallel(widths: Sequence[int], processes: int) -> None:
    """Refuse widths that tensor parallelism does not divide.

    Raises:
        ValueError: names the first such layer.
    """
    for layer, width in enumerate(widths):
        if width % processes:
            raise ValueError(
                f"layer {layer} has {width} MLP neurons, which tensor parallelism over {processes} "
                "does not divide: prune with --round-to auto, or `hfprune export --to padded`"
            )


@cache
def _narrow(name: str, family_class: str) -> type:
    """Return vLLM's class of this name with the width of `mlp_widths` in each layer."""
    from vllm import ModelRegistry

    class Narrow(ModelRegistry.models[family_class].load_model_cls()):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            from vllm.distributed import get_tensor_model_parallel_world_size

            config = vllm_config.model_config.hf_config
            widths = config.mlp_widths or [config.intermediate_size] * config.num_hidden_layers
            check_parallel(widths, get_tensor_model_parallel_world_size())
            with _layers_of(config, widths):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            for layer, width in zip(self.model.layers, widths, strict=True):
                mlp = getattr(layer, "mlp", None)  # None on another rank of a pipeline
                if mlp is not None and mlp.down_proj.input_size != width:
                    raise ValueError(
                        f"this version of vLLM made {mlp.down_proj.input_size} MLP neurons where "
                        f"mlp_widths says {width}: use `hfprune export --to padded`"
                    )

    Narrow.__name__ = Narrow.__qualname__ = name
    return Narrow


@contextmanager
def _layers_of(config: Any, widths: Sequence[int]) -> Iterator[None]:
    """Have vLLM's layers find their own width in `config.intermediate_size` while they are made.

    All decoders of vLLM make their layers by `make_layers`, and each module has its own name for
    it. A process makes one model at a time.
    """
    from vllm.model_executor.models import utils

    original, widest = utils.make_layers, config.intermediate_size

    def make_layers(count: int, layer_fn: Callable[..., Any], prefix: str) -> Any:
        def narrow_layer(prefix: str) -> Any:
            config.intermediate_size = widths[utils.extract_layer_index(prefix)]
            try:
                return layer_fn(prefix=prefix)
            finally:
                config.intermediate_size = widest

        return original(count, narrow_layer, prefix)

    modules = [
        module
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("vllm.")
        and vars(module).get("make_layers") is original
    ]
    for module in modules:
        vars(module)["make_layers"] = make_layers
    try:
        yield
    finally:
        for module in modules:
            vars(module)["make_layers"] = original
