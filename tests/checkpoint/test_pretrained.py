"""Tokenizers that are missing, damaged or another model's: named as such, in one line."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from truth import tiny_model

from hfprune_fast.checkpoint.pretrained import load_tokenizer
from hfprune_fast.config import TINY_MODEL
from hfprune_fast.errors import CheckpointError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9084449\n"
WORDS = {f"word{i}": i for i in range(2048)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped model, to be damaged."""
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))


def change(folder: Path, changes: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!!!"}},
            "has no tokenizer that can be loaded: Precompiled",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
            "tokenizer cannot encode .*: index out of bounds",
        ),
        (
            {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
            "tokenizer cannot encode .*: chunk size must be non-zero",
        ),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((a|a|[a-z ])+)+\u1234"},
                               "behavior": "Isolated", "invert": False}},
            "tokenizer cannot encode .*: Onig",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"}},
            r"tokenizer cannot encode .*: WordLevel error: Missing \[UNK\]",
        ),
        (
            {"model": {"type": "Unigram", "vocab": [[w, -1.0] for w in WORDS], "unk_id": None}},
            "tokenizer cannot encode .*: Encountered an unknown token",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
            "knows [1-9] of the model's 2048 tokens; its files",
        ),
        (
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": None},
            "knows [1-9] of the model's 2048 tokens; its files",
        ),
    ],
)  # fmt: skip
def test_what_tokenizers_raise_is_one_line(
    folder: Path,
    hfprune: Callable[..., Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    """Rust's panics are no Exceptions, and print where they were before they are raised."""
    change(folder, changes)
    scoring = ["--calibration", "demo", "--samples", 2, "--seq-len", 32]
    run = hfprune("score", folder, *scoring, "--out", folder.parent / "s")
    assert run.code == 2
    (line,) = run.err.splitlines()
    assert line.startswith("hfprune: error: ")
    assert re.search(message, line), line


def into_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "has no tokenizer that can be loaded|knows 0 of"),
        (lambda file: file.write_text(""), "has no tokenizer that can be loaded"),
        (
            lambda file: file.write_text(POINTER),
            "tokenizer.json is a Git LFS pointer, not the file",
        ),
        (into_a_pipe, "tokenizer.json is no regular file"),
    ],
)
def test_damaged_tokenizer_files(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=message) as raised:
        load_tokenizer(folder, vocab_size=2048)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer_is_named(
    tmp_path: Path, text_file: Path, hfprune: Callable[..., Any]
) -> None:
    """transformers makes an empty one of Qwen's class and says nothing."""
    tiny_model("qwen2", vocab_size=300).save_pretrained(tmp_path / "qwen")
    scoring = ["--calibration", text_file, "--seq-len", 16, "--out", tmp_path / "s"]
    run = hfprune("score", tmp_path / "qwen", *scoring)
    assert run.code == 2
    assert "the tokenizer of" in run.err
    assert "of the model's 300 tokens; its files (tokenizer.json" in run.err


def test_padded_vocabularies_are_usual(folder: Path) -> None:
    assert len(load_tokenizer(folder, vocab_size=2 * 2048)) == 2048
