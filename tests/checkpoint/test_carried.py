"""What a pruned checkpoint carries beside its weights: what belongs to a model, and no more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hfprune_fast as hf

KEEP = {layer: torch.arange(0, 96, 2) for layer in range(3)}
MADE = {"config.json", "hfprune.json", "README.md", "model.safetensors"}
CARRIED = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "generation_config.json",
    "chat_template.jinja", "additional_chat_templates/tool.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt",
    "Notice.md", "USE_POLICY.md", "qwen.tiktoken",
}  # fmt: skip
LEFT = {
    "adapter_config.json", "adapter_model.safetensors", "train.txt", "log.jsonl", "optimizer.pt",
    "trainer_state.json", "training_args.bin", "license.exe", "word2vec.model", "secrets.json",
    "modeling_evil.py", "additional_chat_templates/private.txt", "runs", "model.gguf",
}  # fmt: skip


def test_what_belongs_to_a_model_is_carried_and_the_rest_is_named(
    llama_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = {path.name for path in llama_dir.iterdir()}
    (llama_dir / "runs").mkdir()
    (llama_dir / ".cache").mkdir()
    (llama_dir / "additional_chat_templates").mkdir()
    for name in (CARRIED | LEFT) - own - {"runs"}:
        (llama_dir / name).write_text(name)
    (llama_dir / "README.md").write_text("of the dense model")
    hf.prune_checkpoint(llama_dir, tmp_path / "out", KEEP)
    found = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {path.as_posix() for path in found} == CARRIED | MADE
    said = capfd.readouterr().err
    assert said.count("\n") == 1 + said.count("Writing model")
    first = sorted(LEFT)[:3]
    assert f"not copied, no part of the model: {', '.join(first)} and {len(LEFT) - 3} more" in said
    listed = json.loads((tmp_path / "out" / "hfprune.json").read_text())["files"]
    assert set(listed) == CARRIED | MADE


def test_links_carry_nothing_from_outside(
    llama_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "id_rsa").write_text("secret")
    (llama_dir / "vocab.txt").symlink_to(outside / "id_rsa")
    (llama_dir / "merges.txt").symlink_to("/dev/zero")
    (llama_dir / "LICENSE").symlink_to("LICENSE")
    (llama_dir / "additional_chat_templates").symlink_to(outside)
    (outside / "a.jinja").write_text("secret")
    (llama_dir / "texts").mkdir()
    (llama_dir / "texts" / "notice").write_text("kept in the folder")
    (llama_dir / "NOTICE").symlink_to("texts/notice")
    hf.prune_checkpoint(llama_dir, tmp_path / "out", KEEP)
    assert (tmp_path / "out" / "NOTICE").read_text() == "kept in the folder"
    assert not any("secret" in p.read_text("latin-1") for p in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    assert "not copied" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "belongs"), [("models--org--name", True), ("cache", False)])
def test_a_hub_cache_links_to_its_blobs(
    llama_dir: Path, tmp_path: Path, name: str, belongs: bool
) -> None:
    (tmp_path / name / "blobs").mkdir(parents=True)
    folder = tmp_path / name / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for path in llama_dir.iterdir():
        path.rename(tmp_path / name / "blobs" / path.name)
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    hf.prune_checkpoint(folder, tmp_path / "out", KEEP)
    assert (tmp_path / "out" / "tokenizer.json").exists() == belongs
    record = json.loads((tmp_path / "out" / "hfprune.json").read_text())
    assert record["base_model"] == ("org/name" if belongs else "0123abcd")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("base_model: org/name\n" in card) == belongs


def test_remote_code_is_neither_carried_nor_named(llama_dir: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((llama_dir / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (llama_dir / "config.json").write_text(json.dumps(config))
    (llama_dir / "modeling_evil.py").write_text("raise SystemExit")
    hf.prune_checkpoint(llama_dir, tmp_path / "out", KEEP)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "modeling_evil.py").exists()
