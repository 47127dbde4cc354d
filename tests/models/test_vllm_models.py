"""The plugin for vLLM, with a stand-in for vllm; tests/serving runs vLLM itself."""

import re
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from hfprune_fast.models import vllm_models

WIDTHS = [64, 96, 32]


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.down_proj = SimpleNamespace(input_size=width)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules with what vLLM 0.32 has of these names; the dictionary is what is registered."""
    registered: dict[str, Any] = {}
    utils, llama = (ModuleType(f"vllm.model_executor.models.{name}") for name in ("utils", "llama"))

    def make_layers(count: int, layer_fn: Any, prefix: str) -> nn.ModuleList:
        return nn.ModuleList(layer_fn(prefix=f"{prefix}.{i}") for i in range(count))

    class LlamaForCausalLM(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            config = vllm_config.model_config.hf_config
            self.model = nn.Module()
            made = llama.make_layers(3, lambda prefix: Layer(config.intermediate_size), prefix)  # type: ignore[attr-defined]
            self.model.layers = made

    utils.make_layers = llama.make_layers = make_layers  # type: ignore[attr-defined]
    utils.extract_layer_index = lambda prefix: int(re.findall(r"\d+", prefix)[0])  # type: ignore[attr-defined]
    family = SimpleNamespace(load_model_cls=lambda: LlamaForCausalLM)
    package, models = ModuleType("vllm"), ModuleType("vllm.model_executor.models")
    package.ModelRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        get_supported_archs=lambda: {"LlamaForCausalLM"},
        register_model=registered.__setitem__,
        models={"LlamaForCausalLM": family},
    )
    distributed = ModuleType("vllm.distributed")
    distributed.get_tensor_model_parallel_world_size = lambda: registered.get("processes", 1)  # type: ignore[attr-defined]
    models.utils = utils  # type: ignore[attr-defined]
    for module in (package, ModuleType("vllm.model_executor"), models, utils, llama, distributed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm_models._narrow.cache_clear()
    return registered


def made(config: Any) -> list[int]:
    model_class = vllm_models.HFPruneLlamaForCausalLM
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    model = model_class(vllm_config=vllm_config, prefix="model.layers")
    return [layer.mlp.down_proj.input_size for layer in model.model.layers]


def test_vllm_finds_the_plugin() -> None:
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "hfprune"]
    assert found.load() is vllm_models.register


def test_families_that_vllm_has_are_registered_by_name(vllm: dict[str, Any]) -> None:
    vllm_models.register()
    name = "HFPruneLlamaForCausalLM"
    assert vllm == {name: f"hfprune_fast.models.vllm_models:{name}"}


def test_each_layer_is_made_with_its_width(vllm: dict[str, Any]) -> None:
    config = SimpleNamespace(mlp_widths=WIDTHS, intermediate_size=96, num_hidden_layers=3)
    assert made(config) == WIDTHS
    assert config.intermediate_size == 96
    config.mlp_widths = None
    assert made(config) == [96] * 3


def test_parallelism_must_divide_the_widths(vllm: dict[str, Any]) -> None:
    vllm["processes"] = 3
    config = SimpleNamespace(mlp_widths=WIDTHS, intermediate_size=96, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"layer 0 has 64 MLP neurons, which .* 3 does not divide"):
        made(config)


def test_a_version_that_makes_layers_otherwise_is_refused(vllm: dict[str, Any]) -> None:
    llama: Any = sys.modules["vllm.model_executor.models.llama"]
    original = llama.make_layers
    llama.make_layers = lambda *arguments: original(*arguments)
    config = SimpleNamespace(mlp_widths=WIDTHS, intermediate_size=96, num_hidden_layers=3)
    with pytest.raises(ValueError, match="made 96 MLP neurons where mlp_widths says 64"):
        made(config)
