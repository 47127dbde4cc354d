"""None"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama, snapshot, some_keep
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from truth import forward, tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from hfprune_fast.checkpoint.folder import weight_files
from hfprune_fast.errors import ArgumentError, CheckpointError, NumericsError


def alive(keep: dict[int, torch.Tensor], dense: int = 96) -> torch.Tensor:
    mask = torch.zeros(len(keep), dense, dtype=torch.bool)
    for layer, indices in keep.items():
        mask[layer, indices] = True
    return mask


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("llama", {"mlp_bias": True}), ("mistral", {}), ("qwen2", {}), ("qwen3", {})],
)
def test_logits_equal_the_dense_model_with_removed_acts_at_zero(
    save_checkpoint: Callable[..., Path], tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(family, tied=family == "qwen3", **overrides)
    keep, ids = some_keep(), torch.arange(40) * 3 % 127
    masked = forward(model.state_dict(), model.config, ids, alive=alive(keep)).logits
    folder = save_checkpoint(model, max_shard_size="200KB")
    hf.prune_checkpoint(folder, tmp_path / "out", keep)
    from_disk = loading.load_model(tmp_path / "out", device="cpu")
    hf.prune(model, keep)
    with torch.no_grad():
        in_memory, loaded = (m(ids[None]).logits[0] for m in (model, from_disk))
    assert torch.equal(in_memory, loaded)
    assert (in_memory - masked).norm() / masked.norm() < 1e-5  # fp32 norms inside transformers
    for name, tensor in model.state_dict().items():
        assert torch.equal(from_disk.state_dict()[name], tensor), name


def test_in_memory_the_model_is_consistent() -> None:
    model = random_llama()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(True)
    hf.prune(model, some_keep())
    mlp = model.model.layers[0].mlp
    assert model.config.intermediate_size == mlp.intermediate_size == 61
    assert (mlp.gate_proj.out_features, mlp.down_proj.in_features) == (61, 61)
    assert mlp.down_proj.weight.is_contiguous()
    assert mlp.gate_proj.weight.requires_grad
    assert not mlp.up_proj.weight.requires_grad
    table = hf.score(model, torch.zeros(1, 8, dtype=torch.int64))  # and can be scored again
    assert table.l1.shape == (3, 61)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_everything_else_is_byte_identical(
    save_checkpoint: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = save_checkpoint(random_llama().to(dtype), max_shard_size="100KB")
    before = snapshot(folder)
    hf.prune_checkpoint(folder, tmp_path / "out", some_keep(), record={"requested": {}})
    assert snapshot(folder) == before
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        {p.name for p in folder.iterdir()} | {"hfprune.json", "README.md"}
    )
    for path in weight_files(folder):
        old, new = load_file(path), load_file(out / path.name)
        assert list(old) == list(new)
        for name, tensor in old.items():
            assert new[name].dtype == tensor.dtype
            if ".mlp." in name:
                layer = int(name.split(".")[2])
                axis = 1 if "down_proj" in name else 0
                tensor = tensor.index_select(axis, some_keep()[layer])
            assert torch.equal(new[name], tensor), name
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for p in weight_files(out) for t in load_file(p).values()
    )
    config = json.loads((out / "config.json").read_text())
    assert config == {**json.loads((folder / "config.json").read_text()), "intermediate_size": 61}
    record = json.loads((out / "hfprune.json").read_text())
    assert record["requested"] == {}
    assert record["files"] == sorted(p.name for p in out.iterdir())
    assert record["keep"]["model.layers.2.mlp"] == some_keep()[2].tolist()
    assert "61 of 96" in (out / "README.md").read_text()
    assert record["achieved"]["intermediate_size"] == 61
    assert oct((out / "config.json").stat().st_mode) == oct(
        (out / weight_files(out)[0].name).stat().st_mode
    )


def test_other_files_are_carried_over_but_weights_in_other_formats(
    llama_dir: Path, tmp_path: Path
) -> None:
    left = {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", "original"}
    carried = {"vocab.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja"}
    for name in (left - {"original"}) | carried:
        (llama_dir / name).parent.mkdir(exist_ok=True)
        (llama_dir / name).write_text(name)
    (llama_dir / "original").mkdir()
    out = tmp_path / "out"
    hf.prune_checkpoint(llama_dir, out, some_keep())
    assert [(out / name).read_text() for name in carried] == list(carried)
    assert not left & {path.name for path in out.iterdir()}


def test_pruned_checkpoint_can_be_pruned_again(llama_dir: Path, tmp_path: Path) -> None:
    hf.prune_checkpoint(llama_dir, tmp_path / "one", some_keep())
    hf.prune_checkpoint(tmp_path / "one", tmp_path / "two", some_keep(dense=61, width=10))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.model.layers[0].mlp.down_proj.in_features == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.pop(1), r"each layer 0\.\.2, got \[0, 2\]"),
        (lambda k: k.update({1: torch.arange(0)}), r"keep\[1\] .*, one or more"),
        (lambda k: k.update({1: torch.arange(61).flip(0)}), r"keep\[1\] must be sorted"),
        (lambda k: k.update({1: torch.arange(36, 97)}), r"distinct int64 indices in 0\.\.95"),
        (lambda k: k.update({1: torch.arange(-1, 60)}), r"keep\[1\]"),
        (lambda k: k.update({1: torch.zeros(61, dtype=torch.int64)}), r"keep\[1\]"),
        (lambda k: k.update({1: torch.arange(61).float()}), r"keep\[1\]"),
    ],
)
def test_bad_keep(
    llama_dir: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    keep = some_keep()
    change(keep)
    with pytest.raises(ArgumentError, match=message):
        hf.prune_checkpoint(llama_dir, tmp_path / "out", keep)
    with pytest.raises(ArgumentError, match=message):
        hf.prune(random_llama(), keep)
    assert not (tmp_path / "out").exists()


def test_keep_may_be_lists() -> None:
    model: Any = random_llama()
    hf.prune(model, {layer: kept.tolist() for layer, kept in some_keep().items()})
    assert model.config.intermediate_size == 61
    with pytest.raises(ArgumentError, match="got a list"):
        hf.prune(model, [[1, 2]])  # type: ignore[arg-type]


def test_the_shipped_model_by_name(tmp_path: Path) -> None:
    result = hf.prune_checkpoint("demo", tmp_path / "out", some_keep(4, 384, 300))
    assert result["intermediate_size"] == 300
    assert "300 of 384" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor .*up_proj"),
        (
            lambda t: t.update({"model.layers.3.x": torch.zeros(2)}),
            "has a tensor that its architecture does not know: model.layers.3.x",
        ),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), r"model\.norm\.weight holds NaN"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}),
            "model.norm.weight in I8, expected one of F64, .*is it quantised",
        ),
    ],
)
def test_source_that_contradicts_its_config(
    llama_dir: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    path = llama_dir / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((CheckpointError, NumericsError), match=message):
        hf.prune_checkpoint(llama_dir, tmp_path / "out", some_keep())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tied_head_that_is_stored_stays_stored(llama_dir: Path, tmp_path: Path) -> None:
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(llama_dir / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, llama_dir / "model.safetensors", {"format": "pt"})
    result = hf.prune_checkpoint(llama_dir, tmp_path / "out", some_keep())
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    loaded = loading.load_model(tmp_path / "out", device="cpu")
    assert sum(p.numel() for p in loaded.parameters()) == result["params"]  # counted once
