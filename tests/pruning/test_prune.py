import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from truth import forward, tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint import atomic, loading
from hfprune_fast.checkpoint.folder import weight_files
from hfprune_fast.errors import ArgumentError, CheckpointError, NumericsError, OutputError
from hfprune_fast.pruning import on_disk


def some_keep(layers: int = 3, dense: int = 96, width: int = 61) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        layer: torch.randperm(dense, generator=generator)[:width].sort().values
        for layer in range(layers)
    }


def alive(keep: dict[int, torch.Tensor], dense: int = 96) -> torch.Tensor:
    mask = torch.zeros(len(keep), dense, dtype=torch.bool)
    for layer, indices in keep.items():
        mask[layer, indices] = True
    return mask


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


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


def test_output_that_exists(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hf.prune_checkpoint(llama_dir, out, some_keep())  # an empty folder is no loss
    old = snapshot(out)
    with pytest.raises(OutputError, match="--force"):
        hf.prune_checkpoint(llama_dir, out, some_keep(width=20))
    assert snapshot(out) == old
    hf.prune_checkpoint(llama_dir, out, some_keep(width=20), force=True)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 20


def test_force_replaces_only_what_pruning_wrote(
    llama_dir: Path, save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (llama_dir / "LICENSE").write_text("theirs")
    (llama_dir / "original").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds thesis.tex, which hfprune did not write"):
        hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    hf.prune_checkpoint(llama_dir, out, some_keep())
    others = save_checkpoint(random_llama(), "another", max_shard_size="100KB")
    hf.prune_checkpoint(others, out, some_keep(), force=True)  # another source's files are ours too
    for name in ("adapter_model.safetensors", "original/mine", ".git/HEAD", "pytorch_model.bin"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(OutputError, match=f"holds {name}, which hfprune did not write"):
            hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "link").symlink_to("nowhere")
    with pytest.raises(OutputError, match="holds link"):
        hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)
    (out / "link").unlink()
    for record in ("[]", "{}", '{"files": 3}'):  # now it may be anybody's model
        (out / "hfprune.json").write_text(record)
        with pytest.raises(OutputError, match="which hfprune did not write"):
            hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)


def test_what_a_killed_run_left_is_said_and_not_touched(llama_dir: Path, tmp_path: Path) -> None:
    for kind in ("partial", "replaced"):
        (tmp_path / f".out.{kind}-1").mkdir()
    (tmp_path / "link").symlink_to("out")
    said = atomic.leftovers(tmp_path / "link")
    assert ["can be deleted" in line for line in said] == [True, False]
    assert "rename it back" in said[1]
    hf.prune_checkpoint(llama_dir, tmp_path / "out", some_keep())
    assert (tmp_path / ".out.partial-1").is_dir()
    assert (tmp_path / ".out.replaced-1").is_dir()


def test_two_runs_to_one_output(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", shutil.copyfile

    def another_run_ends_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(shutil, "copyfile", real)
        out.mkdir()
        (out / "config.json").write_text("the other's")
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", another_run_ends_first)
    with pytest.raises(OutputError, match=r"cannot write .* new output is whole, in .*out\.new"):
        hf.prune_checkpoint(llama_dir, out, some_keep())
    assert (out / "config.json").read_text() == "the other's"
    *others, new = sorted(p.name for p in tmp_path.iterdir())
    assert (others, new[:8]) == (["model", "out"], "out.new-")
    assert loading.load_model(tmp_path / new).config.intermediate_size == 61


def test_output_by_roundabout_paths(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "to_real").symlink_to(real)
    hf.prune_checkpoint(llama_dir, tmp_path / "to_real", some_keep())
    assert (tmp_path / "to_real").is_symlink()
    assert (real / "config.json").exists()
    hf.prune_checkpoint(llama_dir, real / ".." / "real", some_keep(width=9), force=True)
    assert json.loads((real / "config.json").read_text())["intermediate_size"] == 9
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for out in (".", "", "../empty"):
        with pytest.raises(OutputError, match="current folder"):
            hf.prune_checkpoint(llama_dir, out, some_keep())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "real", "to_real"]


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


@pytest.mark.parametrize("place", [".", "..", "inside", "inside/deeper", "../model", "../link"])
@pytest.mark.parametrize("force", [False, True])
def test_output_that_overlaps_the_source(llama_dir: Path, place: str, force: bool) -> None:
    (llama_dir.parent / "link").symlink_to(llama_dir)
    before = snapshot(llama_dir)
    with pytest.raises(OutputError, match="which is never written to"):
        hf.prune_checkpoint(llama_dir, llama_dir / place, some_keep(), force=force)
    assert snapshot(llama_dir) == before


def test_output_that_is_a_file_or_below_one(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out"):
        with pytest.raises(OutputError, match="is a file"):
            hf.prune_checkpoint(llama_dir, tmp_path / out, some_keep())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission to write"):
        hf.prune_checkpoint(llama_dir, tmp_path / "locked" / "out", some_keep())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc, which not even root may write")
def test_output_that_root_cannot_write(llama_dir: Path) -> None:
    with pytest.raises(OutputError, match=r"/proc/out: cannot|out /proc/out cannot|cannot write"):
        hf.prune_checkpoint(llama_dir, Path("/proc/out"), some_keep())


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """Every write beyond that fails in the kernel, as on a full disk."""
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_nothing(llama_dir: Path, tmp_path: Path) -> None:
    with (
        files_no_larger_than(50_000),
        pytest.raises(OutputError, match=r"cannot write .*out: .*(too large|space)"),
    ):
        hf.prune_checkpoint(llama_dir, tmp_path / "out", some_keep())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_too_little_room_is_seen_before_any_work(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"takes 1024\.0 TiB, but only .* are free"):
        on_disk.check_output_folder(tmp_path / "out", llama_dir, force=False, needed_bytes=1 << 50)


def test_failure_keeps_the_folder_that_force_would_replace(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    hf.prune_checkpoint(llama_dir, out, some_keep())
    old = snapshot(out)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf.prune_checkpoint(llama_dir, out, some_keep(width=20), force=True)
    assert snapshot(out) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
