"""Layers of different widths: reloaded elsewhere, and classes like any."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from checkpoints import random_llama
from fresh_process import in_fresh_process
from safetensors.torch import load_file
from tolerances import assert_no_worse
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from truth import FAMILIES, forward, tiny_model
from uneven import IDS, WIDTHS, keep_of, logits, widths_of

import hfprune_fast as hf
from hfprune_fast.checkpoint import layouts, loading
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import CheckpointError
from hfprune_fast.models import nonuniform
from hfprune_fast.models.registration import main_class

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("llama", {"mlp_bias": True}), ("mistral", {}), ("qwen2", {}), ("qwen3", {})],
)
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_logits_equal_the_dense_model_with_removed_acts_at_zero(
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    overrides: dict[str, Any],
    layout: str,
) -> None:
    model = tiny_model(family, tied=family == "qwen3", **overrides)
    keep = keep_of()
    alive = torch.stack([torch.isin(torch.arange(96), keep[layer]) for layer in range(3)])
    masked = forward(model.state_dict(), model.config, IDS, alive=alive).logits
    folder = save_checkpoint(model, max_shard_size="200KB")
    hf.prune_checkpoint(folder, tmp_path / "out", keep, layout=layout, verify=True)
    from_disk = loading.load_model(tmp_path / "out", device="cpu")
    hf.prune(model, keep)
    assert widths_of(model) == WIDTHS
    assert widths_of(from_disk) == (WIDTHS if layout == "auto" else (96, 96, 96))
    ours = logits(from_disk)
    if layout == "auto":
        assert torch.equal(ours, logits(model))
        for name, tensor in model.state_dict().items():
            assert torch.equal(from_disk.state_dict()[name], tensor), name
    assert (ours - masked).norm() / masked.norm() < 1e-5  # fp32 norms inside transformers


FRESH = """
sys.modules["hfprune_fast"] = None  # importing it now raises ImportError
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
load = lambda where: AutoModelForCausalLM.from_pretrained(
    where, trust_remote_code=True, output_loading_info=True)
for folder in sys.argv[1:]:
    model, info = load(folder)
    assert not any(info.values()), info
    ids = torch.arange(40)[None] * 3 % 127
    logits = model(ids).logits[0].detach()
    longer = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(longer[0, 40], logits[-1].argmax()) and longer.shape == (1, 45)
    model.save_pretrained(f"{folder}-copy")
    again, info = load(f"{folder}-copy")
    assert not any(info.values()), info
    assert torch.equal(again(ids).logits[0], logits)
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=3, pad_token_id=0)
    assert torch.equal(classifier.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert classifier(ids).logits.shape == (1, 3)
    torch.save((logits, model.state_dict()), f"{folder}.pt")
"""


@pytest.mark.slow
def test_a_process_without_this_package(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    cases = {}
    for family in ("llama", "qwen3"):
        model, truth = tiny_model(family, dtype=torch.float32), tiny_model(family)
        folder = save_checkpoint(model, f"dense-{family}")
        for layout in ("custom", "padded"):
            cases[tmp_path / f"{family}-{layout}"] = layout, model, truth
            hf.prune_checkpoint(folder, tmp_path / f"{family}-{layout}", keep_of(), layout=layout)
        for pruned in (model, truth):
            hf.prune(pruned, keep_of())
    in_fresh_process(FRESH, *cases, cwd=tmp_path)
    for out, (layout, model, truth) in cases.items():
        theirs, weights = torch.load(f"{out}.pt")
        if layout == "custom":
            assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
        # The same sums in fp32; their order can depend on widths and alignment of the weights.
        floor = 4 * torch.finfo(torch.float32).eps
        assert_no_worse(theirs, logits(model), logits(truth), floor=floor)
        for folder in (out, Path(f"{out}-copy")):
            code = folder / "modeling_hfprune.py"
            assert code.exists() == (layout == "custom")
            assert layout != "custom" or code.read_bytes() == layouts.CODE.read_bytes()


LOUD = """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
loud = []
for load, message in (
    (AutoModelForCausalLM.from_pretrained, "custom code which must be executed"),
    (lambda where: AutoModelForCausalLM.from_pretrained(where, trust_remote_code=False),
     "trust_remote_code"),
    (LlamaForCausalLM.from_pretrained, "is a per-layer attribute"),  # it read per_layer_config
):
    try:
        load(sys.argv[1])
    except (ValueError, RuntimeError) as error:
        loud.append(message in str(error))
print("\\n", loud)  # after a question of transformers
"""


@pytest.mark.slow
def test_plain_transformers_fails_loudly(llama_dir: Path, tmp_path: Path) -> None:
    hf.prune_checkpoint(llama_dir, tmp_path / "out", keep_of())
    out = in_fresh_process(LOUD, tmp_path / "out", cwd=tmp_path)
    assert out.splitlines()[-1] == " [True, True, True]"


@families
def test_in_memory_it_becomes_a_model_that_saves_itself(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float32)
    own = type(model), type(model.config)
    hf.prune(model, keep_of())
    expected = logits(model)
    assert type(model).__module__ == "hfprune_fast.models.nonuniform"
    assert isinstance(model, own[0])
    assert [layer.mlp.intermediate_size for layer in model.model.layers] == list(WIDTHS)
    assert model.config.intermediate_size == 96
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "nonuniform.py").read_bytes() == layouts.CODE.read_bytes()
    loaded = loading.load_model(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(loaded), expected)
    registered = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert widths_of(registered) == WIDTHS
    hf.prune(model, keep_of((25, 25, 25), WIDTHS))
    assert (type(model), type(model.config)) == own
    model.save_pretrained(tmp_path / "even")
    assert sorted(p.name for p in (tmp_path / "even").iterdir() if p.suffix == ".py") == []
    assert widths_of(AutoModelForCausalLM.from_pretrained(tmp_path / "even")) == (25, 25, 25)


def test_a_class_of_ones_own_saves_what_does_not_load(tmp_path: Path) -> None:
    class Mine(LlamaForCausalLM):
        pass

    model = random_llama()
    model.__class__ = Mine
    hf.prune(model, keep_of())
    assert type(model) is Mine
    assert model.config.mlp_widths == list(WIDTHS)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="shape is not its config's"):
        open_source(tmp_path / "saved")


def test_a_new_model_starts_like_the_family() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}
    config = nonuniform.HFPruneLlamaConfig(
        **sizes, intermediate_size=900, mlp_widths=[900, 700], initializer_range=0.5
    )
    model = nonuniform.HFPruneLlamaForCausalLM(config)
    assert widths_of(model) == (900, 700)
    for layer in model.model.layers:
        deviation = float(layer.mlp.up_proj.weight.detach().std())
        assert 0.48 < deviation < 0.52  # 44,800 draws or more: 0.0017
    for wrong in ([900], [900, 901], [0, 900]):
        config.mlp_widths = wrong
        with pytest.raises(ValueError, match=r"a width in 1\.\.900 for each of the 2 layers"):
            nonuniform.HFPruneLlamaForCausalLM(config)


def test_modules_are_the_familys_and_train_with_checkpointing() -> None:
    model = random_llama()
    names = {name: type(module) for name, module in model.named_modules()}
    hf.prune(model, keep_of())
    found = {name: type(module) for name, module in model.named_modules()}
    assert found.pop("") is nonuniform.HFPruneLlamaForCausalLM
    names.pop("")
    assert found == names  # what peft looks for: nn.Linear called gate_proj, up_proj, down_proj
    gradients = []
    for checkpointing in (False, True):
        model.train().requires_grad_(True).zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == checkpointing
        model(IDS[None], labels=IDS[None]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_lora_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = random_llama()
    hf.prune(model, keep_of())
    lora = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum("mlp" in name for name in tensors) == 18


@families
def test_classes_are_made_once_and_copied_like_any(family: str) -> None:
    name = f"HFPrune{main_class(family)}".removesuffix("ForCausalLM")
    config_class = getattr(nonuniform, f"{name}Config")
    model_class = getattr(nonuniform, f"{name}ForCausalLM")
    assert config_class.model_type == f"hfprune_{family}"
    assert model_class.config_class is config_class
    autos = config_class._auto_class, model_class._auto_class
    assert autos == ("AutoConfig", "AutoModelForCausalLM")
    model = tiny_model(family)
    hf.prune(model, keep_of())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (type(copied), type(copied.config)) == (model_class, config_class)
        assert copied.config.to_dict() == model.config.to_dict()
        assert torch.equal(logits(copied), logits(model))


@families
def test_other_heads_load_by_their_auto_classes(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float32)
    hf.prune(model, keep_of())
    model.save_pretrained(tmp_path)
    ids = IDS[None]
    expected = model.model(ids).last_hidden_state
    decoder = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(ids).last_hidden_state, expected)
    for head in ("SequenceClassification", "TokenClassification"):
        auto = getattr(transformers, f"AutoModelFor{head}")
        loaded = auto.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
        assert type(loaded).__name__ == f"HFPrune{main_class(family)}".replace("CausalLM", head)
        assert torch.equal(loaded.model(ids).last_hidden_state, expected)


def test_peft_is_told_the_familys_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = SimpleNamespace(
        SOME_TO_LORA_TARGET_MODULES_MAPPING={"llama": ["q_proj"], "qwen2": ["k_proj"]}, OTHER=3
    )
    monkeypatch.setitem(sys.modules, "peft.utils", SimpleNamespace(constants=constants))
    model = random_llama()
    hf.prune(model, keep_of())
    mapping = constants.SOME_TO_LORA_TARGET_MODULES_MAPPING
    assert mapping == {"llama": ["q_proj"], "qwen2": ["k_proj"], "hfprune_llama": ["q_proj"]}


@pytest.mark.parametrize("name", ["__path__", "HFPruneConfigs", "LlamaConfig", "HFPruneNoConfig"])
def test_there_are_no_other_classes(name: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(nonuniform, name)
