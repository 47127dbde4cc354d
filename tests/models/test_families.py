from types import SimpleNamespace

import pytest
from truth import tiny_model

from hfprune_fast.errors import UnsupportedModelError
from hfprune_fast.models.declared import family_of
from hfprune_fast.models.families import Family, Site
from hfprune_fast.models.sites import parts_of
from hfprune_fast.models.spec import ModelSpec, spec_of
from hfprune_fast.models.tensors import Place, place_of


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_parts_are_the_models_own(family: str) -> None:
    model = tiny_model(family)
    parts = parts_of(model)
    assert parts.decoder is model.model
    assert parts.head is model.lm_head
    assert [mlp.down for mlp in parts.mlps] == [layer.mlp.down_proj for layer in model.model.layers]
    assert parts.mlps[1].gate is model.model.layers[1].mlp.gate_proj
    assert parts.mlps[1].up is model.model.layers[1].mlp.up_proj


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("layers.0.mlp.gate_proj.weight", Place(0, 0)),
        ("layers.12.mlp.up_proj.bias", Place(12, 0)),
        ("layers.3.mlp.down_proj.weight", Place(3, 1)),
        ("layers.3.mlp.down_proj.bias", None),
        ("layers.3.self_attn.o_proj.weight", None),
        ("layers.3.mlpXgate_proj.weight", None),
        ("layers.3.mlp.gate_proj.weight_scale", None),
        ("embed_tokens.weight", None),
    ],
)
def test_where_neurons_are(name: str, place: Place | None) -> None:
    assert place_of(Family(), name) == place
    fused = Family(Site("mlp.both", "mlp.both"))
    assert place_of(fused, "layers.2.mlp.both.weight") == Place(2, 0, times=2)


@pytest.mark.parametrize("config", [{}, {"model_type": "rwkv"}, {"model_type": ["llama"]}])
def test_unknown_families(config: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModelError, match="supported are llama, mistral, qwen2"):
        family_of(config)


def test_a_model_without_a_head() -> None:
    with pytest.raises(UnsupportedModelError, match="load it with AutoModelForCausalLM"):
        parts_of(tiny_model("llama").model)
    with pytest.raises(UnsupportedModelError, match="got SimpleNamespace"):
        parts_of(SimpleNamespace())  # type: ignore[arg-type]


def test_pruned_to() -> None:
    size = spec_of(tiny_model("llama"))
    result = size.pruned_to(72)
    assert result["prune_ratio"] == 0.25
    assert result["dense_params"] - result["params"] == 3 * 24 * 3 * 64
    assert size.pruned_to(96)["param_ratio"] == 0


def test_equal_widths_are_one_width() -> None:
    size = ModelSpec("llama", 2, 8, 5, 1000, 900, 24)
    assert size == ModelSpec("llama", 2, 8, 5, 1000, 900, 24, mlp_widths=(5, 5))
    assert (size.widths, size.params_at((5, 4)), size.params_at(4)) == ((5, 5), 976, 952)
    uneven = ModelSpec("llama", 2, 8, 5, 1000, 900, 24, mlp_widths=(5, 3))
    assert (uneven.params_at(3), uneven.linear_params_at((4, 3))) == (952, 876)
