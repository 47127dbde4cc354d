import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file, save_file
from truth import tiny_model

from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.config_json import read_config
from hfprune_fast.checkpoint.folder import TINY_MODEL, find_model, weight_files
from hfprune_fast.checkpoint.loading import blueprint
from hfprune_fast.checkpoint.skeleton import spec_from_config
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import ArgumentError, CheckpointError, HFPruneError
from hfprune_fast.models.spec import spec_of

OLD_BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_spec_from_config_is_the_models(
    save_checkpoint: Callable[..., Path], family: str, tied: bool
) -> None:
    model = tiny_model(family, dtype=torch.bfloat16, tied=tied)
    assert spec_from_config(save_checkpoint(model))[0] == spec_of(model)


def test_float16_runs_in_float32_on_a_cpu(save_checkpoint: Callable[..., Path]) -> None:
    folder = save_checkpoint(random_llama().half())
    assert loading.load_model(folder, device="cpu").dtype == torch.float32
    assert loading.load_model(folder, device="cpu", dtype="float16").dtype == torch.float16


def test_parameters_of_a_neuron(save_checkpoint: Callable[..., Path]) -> None:
    plain = spec_of(tiny_model("llama"))
    biased = spec_of(tiny_model("llama", mlp_bias=True))
    assert plain.params_per_neuron == 3 * 64
    assert biased.params_per_neuron == 3 * 64 + 2  # down_proj's bias belongs to no neuron
    for size, model in ((plain, {}), (biased, {"mlp_bias": True})):
        smaller = spec_of(tiny_model("llama", intermediate_size=50, **model))
        assert size.params_at(50) == smaller.total_params
        assert size.linear_params_at(50) == smaller.linear_params


def test_old_rotary_buffers_are_tolerated(llama_dir: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[OLD_BUFFER] = torch.ones(8)

    change_tensors(llama_dir, add)
    loaded = loading.load_model(llama_dir, device="cpu")
    assert torch.equal(loaded.lm_head.weight, random_llama().lm_head.weight)


def test_base_model_names_without_prefix(llama_dir: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_tensors(llama_dir, strip)
    loaded = loading.load_model(llama_dir, device="cpu")
    assert torch.equal(loaded.lm_head.weight, random_llama().lm_head.weight)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("model.layers.1.mlp.up_proj.weight"),
            r"lacks the tensor model\.layers\.1\.mlp\.up_p",
        ),
        (drop("lm_head.weight"), r"lacks the tensor lm_head\.weight"),
        (put("model.layers.9.mlp.up_proj.weight", 4, 4), r"does not know: model\.layers\.9"),
        (put("model.norm.weight", 3), r"shape is not its config's: model\.norm\.weight"),
    ],
)
def test_tensors_that_do_not_fit(
    llama_dir: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    change_tensors(llama_dir, change)
    with pytest.raises(CheckpointError, match=message):
        loading.load_model(llama_dir, device="cpu")


def test_truncated_file(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or not"):
        open_source(llama_dir)


def test_missing_shard(save_checkpoint: Callable[..., Path]) -> None:
    folder = save_checkpoint(random_llama(), max_shard_size="50KB")
    lost = weight_files(folder)[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {lost.name}"):
        open_source(folder)


def test_index_that_is_wrong(save_checkpoint: Callable[..., Path]) -> None:
    folder = save_checkpoint(random_llama(), max_shard_size="50KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    for weight_map, message in (
        ({"a": "../../secret.safetensors"}, "names a file outside its folder"),
        ({"no.such.tensor": first}, "no.such.tensor is in the index .* but in no shard"),
        (["a"], "has no weight_map"),
    ):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            open_source(folder)


def test_pickled_weights_are_not_opened(llama_dir: Path) -> None:
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        loading.load_model(llama_dir)
    (llama_dir / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(CheckpointError, match=r"only pickled weights .*save_pretrained"):
        loading.load_model(llama_dir)


def test_remote_code_is_never_run(llama_dir: Path) -> None:
    flag = llama_dir / "ran"
    (llama_dir / "modeling_evil.py").write_text(f"open({str(flag)!r}, 'w')\n")
    change_config(llama_dir, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    loading.load_model(llama_dir, device="cpu")  # the family's own class is used
    assert not flag.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ("\x00", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
    ids=["open", "list", "NUL", "deep"],
)
def test_bad_config(llama_dir: Path, content: str, message: str) -> None:
    (llama_dir / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(llama_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\).*quantise the re"),
        ({"quantization_config": "gptq"}, r"quantised \(gptq\)"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LM.* is not .*no gate"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"architectures": 5, "model_type": "gpt2"}, "this model is not supported"),
        ({"architectures": "G", "model_type": None}, "this model is not supported"),
        ({"num_hidden_layers": "three"}, r"config\.json"),
        ({"hidden_act": "nope"}, r"config\.json"),
        ({"intermediate_size": "96"}, r"config\.json"),
        ({"num_attention_heads": 0}, r"config\.json"),
        ({"rope_parameters": {"rope_type": "zzz"}}, r"config\.json"),
    ],
)
def test_config_values_that_are_refused(
    llama_dir: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(llama_dir, **changes)
    for refusing in (spec_from_config, loading.load_model):
        with pytest.raises(HFPruneError, match=message) as raised:
            refusing(llama_dir)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500


def test_quantization_config_of_null_is_none(llama_dir: Path) -> None:
    change_config(llama_dir, quantization_config=None)
    assert loading.load_model(llama_dir, device="cpu").config.intermediate_size == 96


def test_tied_head_that_is_stored_and_differs(llama_dir: Path) -> None:
    change_config(llama_dir, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"yet lm_head.weight differs from .*embed_tokens"):
        blueprint(llama_dir)

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(llama_dir, tie)
    blueprint(llama_dir)
    loading.load_model(llama_dir, device="cpu")


@pytest.mark.parametrize("config_dtype", ["float16", "bfloat16", "float64", None])
def test_auto_dtype_is_that_of_the_weights(llama_dir: Path, config_dtype: str | None) -> None:
    change_config(llama_dir, dtype=config_dtype)
    model = loading.load_model(llama_dir, device="cpu")
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, random_llama().lm_head.weight)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_runs_in_float32_on_a_cpu_without_instructions_for_it(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    expected = torch.bfloat16 if fast else torch.float32
    assert blueprint("demo", device="cpu").dtype == expected
    assert blueprint("demo", device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_finding_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("demo") == TINY_MODEL
    (tmp_path / "demo").mkdir()
    assert find_model("demo") == Path("demo")  # the user's own folder comes first
    (tmp_path / "file").write_text("")
    for name, message in (
        ("file", "is a file"),
        ("./nowhere", "no model folder ./nowhere"),
        ("a/b/c", "not a hub name either"),
        ("org/no-such-model", "the hub says"),
    ):
        with pytest.raises(CheckpointError, match=message):
            find_model(name)


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, asking what memory it has left raises."""
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert loading.torch_device("auto") == torch.device("cuda:1")
    assert loading.torch_device("cuda") == torch.device("cuda:1")
    assert loading.torch_device("cuda:0") == torch.device("cuda:0")


def test_unknown_device() -> None:
    for device in ("nonsense", "meta", "mps"):
        with pytest.raises(ArgumentError, match=f"device '{device}' cannot be used here"):
            loading.torch_device(device)
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="device 'cuda'"):
            loading.torch_device("cuda")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("self_attn.q_proj.lora_A.weight", "merge the adapter"),
        ("self_attn.q_proj.base_layer.weight", "merge the adapter"),
        ("mlp.up_proj.weight_scale", "is it quantised, masked or parametrised"),
        ("self_attn.k_proj.qweight", "is it quantised, masked or parametrised"),
        ("mlp.gate_proj.weight_mask", "is it quantised, masked or parametrised"),
        ("mlp.down_proj.parametrizations.weight.original0", "is it quantised, masked or param"),
    ],
)
def test_layers_must_be_stored_plain(llama_dir: Path, stored: str, message: str) -> None:
    weights = llama_dir / "model.safetensors"
    tensors = load_file(weights)
    tensors |= {f"model.layers.{i}.{stored}": torch.zeros(4, 4) for i in range(3)}
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        open_source(llama_dir)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter and no model; merge it into"):
        open_source(tmp_path)
