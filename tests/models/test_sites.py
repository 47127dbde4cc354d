"""What is no plain weight is refused in one line, before a model is touched."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import PreTrainedModel

import hfprune_fast as hf
from hfprune_fast.errors import ArgumentError

IDS = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
KEEP = {layer: torch.arange(0, 96, 2) for layer in range(3)}


class Adapted(nn.Module):
    """As peft's lora.Linear is built."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        dtype = base.weight.dtype
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, False, dtype=dtype)})
        self.lora_B = nn.ModuleDict(
            {"default": nn.Linear(2, base.out_features, False, dtype=dtype)}
        )

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Int8Linear(nn.Linear):
    """As a layer loaded in 8 bit is built."""


class QuantisedTensor(Tensor):
    """A parameter that is a float only in name."""


def adapt(model: PreTrainedModel, *names: str) -> None:
    for layer in model.model.layers:
        for name in names:
            layer.set_submodule(name, Adapted(layer.get_submodule(name)))


def mlp(model: PreTrainedModel, layer: int = 1) -> Any:
    return model.model.layers[layer].mlp


def quantise(linear: nn.Linear) -> None:
    linear.__class__ = Int8Linear
    linear._parameters["weight"] = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)


def shard(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().flatten()[:0])


def share(model: PreTrainedModel) -> None:
    mlp(model, 2).up_proj.weight = mlp(model, 0).gate_proj.weight


def repeat(model: PreTrainedModel) -> None:
    model.model.layers[2] = model.model.layers[1]


def offload(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.to("meta"))


def sparse(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse())


def as_buffer(linear: nn.Linear) -> None:
    weight = linear._parameters.pop("weight")
    linear.register_buffer("weight", weight)


def subclassed(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QuantisedTensor))


BROKEN: dict[str, tuple[Callable[[PreTrainedModel], object], str]] = {
    "adapter on down": (lambda m: adapt(m, "mlp.down_proj"), r"0\.mlp\.down_proj carries an adap"),
    "adapter on gate": (lambda m: adapt(m, "mlp.gate_proj"), "merge_and_unload"),
    "adapter on the head": (lambda m: setattr(m, "lm_head", Adapted(m.lm_head)), "lm_head carries"),
    "8 bit": (lambda m: quantise(mlp(m).down_proj), r"torch\.int8, expected a plain floating-"),
    "8 bit attention": (lambda m: quantise(m.model.layers[0].self_attn.q_proj), "q_proj.*int8"),
    "float8": (
        lambda m: setattr(mlp(m), "up_proj", mlp(m).up_proj.to(torch.float8_e4m3fn)),
        "float8_e4m3fn, expected a plain floating-point",
    ),
    "sparse": (lambda m: sparse(mlp(m).up_proj), r"torch\.sparse_coo torch\.float32, expected a"),
    "weight that is a buffer": (lambda m: as_buffer(mlp(m).up_proj), "Linear without a parameter"),
    "a tensor of another class": (lambda m: subclassed(mlp(m).up_proj), "is a QuantisedTensor"),
    "a layer of another class": (
        lambda m: mlp(m).set_submodule("up_proj", Int8Linear(64, 96, bias=False)),
        r"1\.mlp\.up_proj is a Int8Linear, expected torch\.nn\.Linear",
    ),
    "quantised by its config": (
        lambda m: setattr(m.config, "quantization_config", {"quant_method": "gptq"}),
        "the model is quantised",
    ),
    "mask": (lambda m: prune.l1_unstructured(mlp(m).gate_proj, "weight", 0.5), "a pruning mask"),
    "old weight_norm": (lambda m: weight_norm(mlp(m).down_proj), "down_proj has a weight_norm"),
    "weight_norm": (lambda m: parametrizations.weight_norm(mlp(m).up_proj), "is parametrised"),
    "old spectral_norm": (
        lambda m: nn.utils.spectral_norm(mlp(m).up_proj),
        "computes its weight anew",
    ),
    "patched forward": (
        lambda m: setattr(mlp(m).up_proj, "forward", lambda x: 2 * x),
        "take off what wraps or patches it",
    ),
    "shared weight": (share, r"0\.mlp\.gate_proj\.weight and .*2\.mlp\.up_proj\.weight are one"),
    "layer used twice": (repeat, "are one parameter; give each its own"),
    "meta": (lambda m: offload(mlp(m).gate_proj), "is on the meta device"),
    "sharded": (lambda m: shard(mlp(m).gate_proj), "gate_proj has a weight .* must be gathered"),
    "missing": (lambda m: delattr(mlp(m), "up_proj"), "has not the parts of a llama"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("face", ["score", "refit", "prune"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_model_that_is_not_plain_is_refused_untouched(case: str, face: str) -> None:
    model, (break_it, message) = random_llama().train(), BROKEN[case]
    with torch.no_grad():
        break_it(model)
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    faces: dict[str, Callable[[], object]] = {
        "score": lambda: hf.score(model, [IDS]),
        "refit": lambda: hf.refit_down_proj(model, [IDS], KEEP),
        "prune": lambda: hf.prune(model, KEEP),
    }
    with pytest.raises(hf.HFPruneError, match=message) as refused:
        faces[face]()
    assert "\n" not in str(refused.value)
    assert before == {name: (id(p), p._version) for name, p in model.named_parameters()}
    assert all(module.training for module in model.modules())
    assert mlp(model, 0).down_proj.in_features == model.config.intermediate_size == 96


class Wrapper(nn.Module):
    """As peft's PeftModel is built."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.config = model.config

    def get_base_model(self) -> nn.Module:
        return self.base_model.model  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_on_attention_are_part_of_what_is_scored(
    wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)  # of the adapters
    model = random_llama().double()
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    adapt(adapted, "self_attn.q_proj", "self_attn.o_proj")
    for layer, plain in zip(adapted.model.layers, merged.model.layers, strict=True):
        for name in ("q_proj", "o_proj"):
            lora = getattr(layer.self_attn, name)
            added = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
            getattr(plain.self_attn, name).weight.data += added.detach()
    subject: Any = Wrapper(adapted) if wrapped else adapted
    table, truth = (hf.score(m, [IDS], criterion="fisher", obs=True) for m in (subject, merged))
    assert "the adapters on model.layers.0.self_attn.q_proj" in capsys.readouterr().err
    for name, expected in truth.statistics.items():
        torch.testing.assert_close(table.statistics[name], expected, rtol=1e-8, atol=1e-15)
    assert table.model == truth.model  # the adapters' own parameters are not counted
    assert hf.evaluate(merged, subject, [IDS]).kl_nats < 1e-9
    refitted, expected = (hf.refit_down_proj(m, [IDS], KEEP) for m in (subject, merged))
    torch.testing.assert_close(refitted[2], expected[2], rtol=1e-8, atol=1e-12)
    with pytest.raises(ArgumentError, match="q_proj carries an adapter; merge it first"):
        hf.prune(subject, KEEP)


def test_a_compiled_model_is_the_model_inside() -> None:
    model, expected = random_llama(), random_llama()
    widths = {layer: torch.arange(40 + layer) for layer in range(3)}
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(hf.score(compiled, [IDS]).l1, hf.score(expected, [IDS]).l1)
    hf.prune(compiled, widths)
    hf.prune(expected, widths)
    assert type(model) is type(expected)  # the class of layers of differing widths
    assert hf.evaluate(expected, compiled, [IDS]).kl_nats == 0


def test_a_wrapper_with_a_prompt_of_its_own_is_refused() -> None:
    wrapper: Any = Wrapper(random_llama())
    wrapper.prompt_encoder = nn.Embedding(4, 64)
    with pytest.raises(ArgumentError, match="Wrapper adds a prompt, or other parameters"):
        hf.score(wrapper, [IDS])
    with pytest.raises(ArgumentError, match="Wrapper adds a prompt, or other parameters"):
        hf.evaluate(random_llama(), wrapper, [IDS])


def test_evaluation_runs_what_is_there_but_reads_the_head() -> None:
    model, adapted = random_llama(), random_llama()
    adapt(adapted, "mlp.down_proj")
    with torch.no_grad():
        mlp(adapted).down_proj.lora_B["default"].weight.zero_()
        for layer in (0, 2):
            mlp(adapted, layer).down_proj.lora_A["default"].weight.zero_()
    assert hf.evaluate(model, adapted, [IDS]).kl_nats == 0
    quantise(model.lm_head)
    with pytest.raises(ArgumentError, match="lm_head is a Int8Linear"):
        hf.evaluate(model, adapted, [IDS])


@pytest.mark.parametrize("face", [hf.evaluate, hf.score, hf.prune, hf.refit_down_proj])
@pytest.mark.parametrize("wrong", [{"config": 1}, None, 3])
def test_what_is_no_model(face: Any, wrong: Any) -> None:
    rest = {hf.evaluate: (wrong, [IDS]), hf.score: ([IDS],), hf.prune: (KEEP,)}
    with pytest.raises(ArgumentError, match="expected a loaded causal language model, got a "):
        face(wrong, *rest.get(face, ([IDS], KEEP)))


def test_scoring_wants_one_dtype() -> None:
    model = random_llama()
    mlp(model).to(torch.bfloat16)
    with pytest.raises(
        ArgumentError, match=r"one dtype, got torch\.bfloat16, torch\.float32; cast"
    ):
        hf.score(model, [IDS])
    hf.prune(model, KEEP)
    assert mlp(model).up_proj.weight.shape == (48, 64)
