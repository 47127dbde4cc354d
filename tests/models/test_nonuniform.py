"""Layers of different widths: written in each layout, reloaded elsewhere, used like any model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file
from tolerances import assert_no_worse
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama
from truth import forward, tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint import layouts, loading
from hfprune_fast.checkpoint import source as checkpoints
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.commands import evaluate
from hfprune_fast.errors import ArgumentError, CheckpointError
from hfprune_fast.models import nonuniform
from hfprune_fast.models.families import FAMILIES
from hfprune_fast.models.spec import ModelSpec, spec_of
from hfprune_fast.pruning import selection
from hfprune_fast.scoring.checks import check_table

WIDTHS = (61, 96, 30)
IDS = torch.arange(40) * 3 % 127
families = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])


def keep_of(widths: tuple[int, ...] = WIDTHS, dense: int | tuple[int, ...] = 96) -> Any:
    generator = torch.Generator().manual_seed(5)
    dense = (dense,) * len(widths) if isinstance(dense, int) else dense
    return {
        layer: torch.randperm(of, generator=generator)[:width].sort().values
        for layer, (width, of) in enumerate(zip(widths, dense, strict=True))
    }


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[None]).logits[0]  # type: ignore[no-any-return]


def widths_of(model: PreTrainedModel) -> tuple[int, ...]:
    return spec_of(model).widths


def elsewhere(code: str, *arguments: object, cwd: Path, fails: bool = False) -> str:
    """Run code in a process of its own; return what it printed, or its error."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, torch\ntorch.set_num_threads({threads()})\n{code}"]
        + [str(argument) for argument in arguments],
        cwd=cwd,
        env={**os.environ, "HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout.strip()


def threads() -> int:
    return torch.get_num_threads()


@pytest.fixture
def dense(save_checkpoint: Callable[..., Path]) -> Path:
    return save_checkpoint(random_llama())


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
from transformers import AutoModelForCausalLM
folder, out, copy = sys.argv[1:]
load = lambda where: AutoModelForCausalLM.from_pretrained(
    where, trust_remote_code=True, output_loading_info=True)
model, info = load(folder)
assert not any(info.values()), info
ids = torch.arange(40)[None] * 3 % 127
logits = model(ids).logits[0].detach()
longer = model.generate(ids, max_new_tokens=5, do_sample=False)
assert torch.equal(longer[0, 40], logits[-1].argmax()) and longer.shape == (1, 45)
model.save_pretrained(copy)
again, info = load(copy)
assert not any(info.values()), info
assert torch.equal(again(ids).logits[0], logits)
torch.save((logits, model.state_dict()), out)
"""


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", ["custom", "padded"])
def test_a_process_without_this_package(
    save_checkpoint: Callable[..., Path], tmp_path: Path, family: str, layout: str
) -> None:
    model = tiny_model(family, dtype=torch.float32)
    folder, truth = save_checkpoint(model), tiny_model(family)
    hf.prune_checkpoint(folder, tmp_path / "out", keep_of(), layout=layout)
    for pruned in (model, truth):
        hf.prune(pruned, keep_of())
    elsewhere(FRESH, tmp_path / "out", tmp_path / "logits", tmp_path / "copy", cwd=tmp_path)
    theirs, weights = torch.load(tmp_path / "logits")
    if layout == "custom":
        assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    # The same sums in fp32, in an order that can depend on widths and alignment of the weights.
    assert_no_worse(theirs, logits(model), logits(truth), floor=4 * torch.finfo(torch.float32).eps)
    code = (tmp_path / "copy" / "modeling_hfprune.py", tmp_path / "out" / "modeling_hfprune.py")
    assert [path.exists() for path in code] == [layout == "custom"] * 2
    if layout == "custom":
        assert code[0].read_bytes() == code[1].read_bytes() == layouts.CODE.read_bytes()


@pytest.mark.parametrize("first", ["hfprune_fast", "transformers"])
def test_importing_this_package_replaces_the_folders_code(
    dense: Path, tmp_path: Path, first: str
) -> None:
    out = tmp_path / "out"
    hf.prune_checkpoint(dense, out, keep_of())
    (out / "modeling_hfprune.py").write_text("raise SystemExit('the folder has run its code')")
    code = """
if sys.argv[2] == "transformers":
    from transformers import AutoModelForCausalLM
import hfprune_fast
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert AutoConfig.from_pretrained(sys.argv[1]).mlp_widths == model.config.mlp_widths
AutoTokenizer.from_pretrained(sys.argv[1])
print(type(model).__module__, model.config.mlp_widths)
"""
    assert (
        elsewhere(code, out, first, cwd=tmp_path) == f"hfprune_fast.models.nonuniform {[*WIDTHS]}"
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("AutoModelForCausalLM.from_pretrained(folder)", "custom code which must be executed"),
        ("AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)", "trust_remote"),
        ("LlamaForCausalLM.from_pretrained(folder)", "ignore_mismatched_sizes"),
    ],
)
def test_plain_transformers_fails_loudly(
    dense: Path, tmp_path: Path, how: str, message: str
) -> None:
    hf.prune_checkpoint(dense, tmp_path / "out", keep_of())
    code = f"""
from transformers import AutoModelForCausalLM, LlamaForCausalLM
folder = sys.argv[1]
{how}
"""
    error = elsewhere(code, tmp_path / "out", cwd=tmp_path, fails=True)
    assert re.search(rf"^(ValueError|RuntimeError): (.|\n)*{message}", error, re.MULTILINE), error


def test_padding_is_zeros_and_replaced_tensors_are_padded_too(dense: Path, tmp_path: Path) -> None:
    keep, widths = keep_of((61, 70, 30)), (61, 70, 30)
    down, up = "model.layers.2.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    refitted = torch.randn(64, 30)
    result = hf.prune_checkpoint(
        dense, tmp_path / "out", keep, layout="padded", replace={down: refitted}, verify=True
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(dense / "model.safetensors")
    assert torch.equal(written[down], torch.cat([refitted, torch.zeros(64, 40)], dim=1))
    assert torch.equal(written[up], torch.cat([stored[up][keep[0]], torch.zeros(9, 64)]))
    assert all(t.shape in ((70, 64), (64, 70)) for n, t in written.items() if ".mlp." in n)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**json.loads((dense / "config.json").read_text()), "intermediate_size": 70}
    assert (result["layout"], result["mlp_widths"]) == ("padded", list(widths))
    assert result["params"] == sum(t.numel() for t in written.values())  # padding and all
    card = (tmp_path / "out" / "README.md").read_text()
    assert "30 to 70 (mean 53.7) of 96, padded with zeros to the widest" in card
    assert "as large as if all layers were as wide" in card
    with pytest.raises(ArgumentError, match=r"must be \(64, 30\) torch.float32, got \(64, 70\)"):
        hf.prune_checkpoint(
            dense, tmp_path / "b", keep, layout="padded", replace={down: torch.ones(64, 70)}
        )


def test_layouts_of_one_width_are_one(dense: Path, tmp_path: Path) -> None:
    for layout in layouts.LAYOUTS:
        hf.prune_checkpoint(dense, tmp_path / layout, keep_of((50, 50, 50)), layout=layout)
    files = [{p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in layouts.LAYOUTS]
    assert all(file == files[0] for file in files)
    with pytest.raises(ArgumentError, match=r"layout must be one of auto, .*, got 'uneven'"):
        hf.prune_checkpoint(dense, tmp_path / "out", keep_of(), layout="uneven")


def test_native_layout_only_where_transformers_builds_it(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OwnWidthLayer(modeling_llama.LlamaDecoderLayer):
        """As a version of transformers would build it that knows per_layer_config."""

        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config.per_layer_config[layer_idx], layer_idx)

    with pytest.raises(ArgumentError, match=r"layout native: .*; use layout custom or padded"):
        hf.prune_checkpoint(dense, tmp_path / "out", keep_of(), layout="native")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", OwnWidthLayer)
    result = hf.prune_checkpoint(dense, tmp_path / "out", keep_of(), layout="native")
    assert result["params"] == checkpoints.open_source(tmp_path / "out").size.total_params
    model = random_llama()
    hf.prune(model, keep_of())
    assert torch.equal(logits(loading.load_model(tmp_path / "out", device="cpu")), logits(model))
    assert not (tmp_path / "out" / "modeling_hfprune.py").exists()
    hf.prune_checkpoint(tmp_path / "out", tmp_path / "even", keep_of((20, 20, 20), WIDTHS))
    assert "per_layer_config" not in json.loads((tmp_path / "even" / "config.json").read_text())


def test_what_was_achieved_is_told(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = hf.prune_checkpoint(dense, out, keep_of())
    model = loading.load_model(out, device="cpu")
    removed = 3 * 96 - sum(WIDTHS)
    assert result["mlp_widths"] == list(WIDTHS)
    assert (result["intermediate_size"], result["dense_intermediate_size"]) == (96, 96)
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["prune_ratio"] == pytest.approx(removed / (3 * 96), rel=1e-15)
    assert result["dense_params"] - result["params"] == removed * 3 * 64
    record = json.loads((out / "hfprune.json").read_text())
    assert record["achieved"] == result
    assert [len(record["keep"][str(i)]) for i in range(3)] == list(WIDTHS)
    assert "modeling_hfprune.py" in record["files"]
    assert "| 30 to 96 (mean 62.3) of 96 |" in (out / "README.md").read_text()
    hf.prune_checkpoint(dense, out, keep_of((5, 6, 7)), force=True)  # the code file is ours too


def test_pruned_again(dense: Path, tmp_path: Path) -> None:
    one, two, even = (tmp_path / name for name in ("one", "two", "even"))
    hf.prune_checkpoint(dense, one, keep_of())
    narrower = keep_of((40, 41, 30), WIDTHS)
    result = hf.prune_checkpoint(one, two, narrower)
    assert result["dense_mlp_widths"] == list(WIDTHS)
    assert widths_of(loading.load_model(two, device="cpu")) == (40, 41, 30)
    model = loading.load_model(one, device="cpu")
    hf.prune(model, narrower)
    assert torch.equal(logits(loading.load_model(two, device="cpu")), logits(model))
    with pytest.raises(ArgumentError, match=r"keep\[2\] must be .* in 0\.\.29"):
        hf.prune_checkpoint(one, tmp_path / "out", keep_of((40, 40, 40), (61, 96, 96)))
    hf.prune_checkpoint(two, even, keep_of((25, 25, 25), (40, 41, 30)))
    assert not (even / "modeling_hfprune.py").exists()
    config = json.loads((even / "config.json").read_text())
    assert config == {**json.loads((dense / "config.json").read_text()), "intermediate_size": 25}
    assert type(AutoModelForCausalLM.from_pretrained(even)) is LlamaForCausalLM


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
        checkpoints.open_source(tmp_path / "saved")


def test_a_new_model_starts_like_the_family() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}
    config = nonuniform.HFPruneLlamaConfig(
        **sizes, intermediate_size=900, mlp_widths=[900, 700], initializer_range=0.5
    )
    model = nonuniform.HFPruneLlamaForCausalLM(config)
    assert widths_of(model) == (900, 700)
    for layer in model.model.layers:
        assert (
            0.48 < float(layer.mlp.up_proj.weight.detach().std()) < 0.52
        )  # 44,800 draws or more: 0.0017
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
    targets = ["gate_proj", "up_proj", "down_proj"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    tuned.save_pretrained(tmp_path / "adapter")
    shapes = {
        n: t.shape for n, t in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
    }
    assert sum("mlp" in name for name in shapes) == 18


def test_scores_are_those_of_the_padded_model(dense: Path, tmp_path: Path) -> None:
    keep, ids = keep_of(), torch.arange(96).view(4, 24) % 127
    for layout in ("custom", "padded"):
        hf.prune_checkpoint(dense, tmp_path / layout, keep, layout=layout)
    table, padded = (hf.score(tmp_path / x, ids, device="cpu") for x in ("custom", "padded"))
    exact = hf.score(tmp_path / "padded", ids, device="cpu", dtype="float64")
    assert table.model.mlp_widths == WIDTHS
    for name in ("l1", "l2", "mask", "act", "down_norm"):
        ours, theirs, truth = (getattr(t, name) for t in (table, padded, exact))
        assert_no_worse(ours, theirs, truth, floor=16 * torch.finfo(torch.float32).eps)
        for layer, width in enumerate(WIDTHS):
            assert not ours[layer, width:].any()
            assert ours[layer, :width].all()
    table.save(tmp_path / "scores.safetensors")
    loaded = hf.ImportanceTable.load(tmp_path / "scores.safetensors")
    assert loaded.model == table.model
    check_table(loaded, open_source(tmp_path / "custom"))
    check_table(
        hf.score(loading.load_model(tmp_path / "custom"), ids), open_source(tmp_path / "custom")
    )
    with pytest.raises(ArgumentError, match=r"30 to 96 \(mean 62.3\) MLP neurons, and neurons are"):
        hf.select(table, prune_ratio=0.5)
    for offload in ("disk", "cpu"):
        streamed = hf.score(tmp_path / "custom", ids, device="cpu", offload=offload)
        assert torch.equal(streamed.l1, table.l1)


def test_scored_and_pruned_from_the_command_line(
    dense: Path, tmp_path: Path, hfprune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "keep_top", lambda *_, **__: keep_of())
    text = ["--calibration", "demo", "--samples", 2, "--seq-len", 32, "--device", "cpu"]
    run = hfprune("prune", dense, "--out", tmp_path / "out", "--prune-ratio", 0.3, *text)
    assert run.code == 0, run.err
    assert "MLP neurons a layer 30 to 96 (mean 62.3) of 96 (35.07% of the neurons)" in run.out
    run = hfprune("score", tmp_path / "out", "--out", tmp_path / "scores", *text)
    assert run.code == 0, run.err
    assert "3 layers x 30 to 96 (mean 62.3) neurons scored" in run.out
    run = hfprune("plan", tmp_path / "out", "--prune-ratio", 0.3)
    assert run.code == 2
    assert "neurons are chosen only where all have as many" in run.err


@pytest.mark.parametrize("layout", ["custom", "padded"])
def test_evaluated_from_the_command_line(
    dense: Path, tmp_path: Path, hfprune: Callable[..., Any], layout: str
) -> None:
    hf.prune_checkpoint(dense, tmp_path / "out", keep_of(), layout=layout)
    code = tmp_path / "out" / "modeling_hfprune.py"
    if code.exists():
        code.write_text("raise SystemExit('the folder has run its code')")
    model = random_llama()
    hf.prune(model, keep_of())
    numbers = []
    for offload in ("none", "disk"):
        options = ["--text", "demo", "--samples", 2, "--seq-len", 32, "--device", "cpu", "--json"]
        run = hfprune("evaluate", dense, tmp_path / "out", *options, "--offload", offload)
        assert run.code == 0, run.err
        numbers.append(json.loads(run.out))
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)
    assert numbers[0]["kl_nats"] > 0.01
    same = evaluate.run(tmp_path / "out", tmp_path / "out", "demo", samples=2, seq_len=32)
    assert same.kl_nats == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mlp_widths": [61, 96]},
            r"a? ?width in 1\.\.96 for each of its 3 layers, got \[61, 96\]",
        ),
        ({"mlp_widths": [61, 97, 30]}, "MLP width in"),
        ({"mlp_widths": [61, True, 30]}, "MLP width in"),
        ({"mlp_widths": "96"}, "MLP width in"),
        ({"mlp_widths": [61, 96, 31]}, "shape is not its config's"),
        ({"mlp_widths": None}, "shape is not its config's"),
        ({"model_type": "hfprune_gpt2"}, "no gated MLP is known for model_type 'hfprune_gpt2'"),
        ({"model_type": "llama"}, "shape is not its config's"),
        ({"model_type": "llama", "per_layer_config": {"0": {"head_dim": 3}}}, "nothing else is kn"),
        ({"model_type": "llama", "per_layer_config": [3]}, "nothing else is known"),
    ],
)
def test_config_that_is_not_what_the_tensors_are(
    dense: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    hf.prune_checkpoint(dense, out, keep_of())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(hf.HFPruneError, match=message):
        checkpoints.open_source(out)


def test_every_family_has_its_classes() -> None:
    assert layouts._CLASSES.keys() == FAMILIES.keys()
    for family, name in layouts._CLASSES.items():
        config = getattr(nonuniform, f"HFPrune{name}Config")
        model = getattr(nonuniform, f"HFPrune{name}ForCausalLM")
        assert config.model_type == f"hfprune_{family}"
        assert model.config_class is config


def test_sizes_of_before_have_no_widths() -> None:
    size = ModelSpec("llama", 2, 8, 5, 1000, 900, 24)
    assert size == ModelSpec("llama", 2, 8, 5, 1000, 900, 24, mlp_widths=(5, 5))
    assert (size.widths, size.params_at((5, 4)), size.params_at(4)) == ((5, 5), 976, 952)
    uneven = ModelSpec("llama", 2, 8, 5, 1000, 900, 24, mlp_widths=(5, 3))
    assert (uneven.params_at(3), uneven.linear_params_at((4, 3))) == (952, 876)
