"""Names and metadata on a model card and in a record are shown, and do nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hfprune_fast as hf
from hfprune_fast.console import display_name

KEEP = {layer: torch.arange(0, 96, 2) for layer in range(3)}
HOSTILE = (
    "<script>alert(1)</script>", "[click](http://evil.example)", "a\n# b\r\n---\nx: y", "`code`",
    "a|b|c", "\x1b]0;pwned\x07", "\x7f\x9b2J", "\u202eevil", "![x](y)", "&lt;b&gt;", "**bold** _x_",
    "\ud800", "x" * 5000,
)  # fmt: skip


def unescaped(card: str) -> list[str]:
    """Return what means something in Markdown or HTML, in its order, and the ends of lines."""
    return re.findall(r"(?<!\\)[\n<>|`*_\[\]!&#:]", card.replace("\\\\", ""))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_escaped(llama_dir: Path, tmp_path: Path, name: str) -> None:
    cards = []
    for text in (name, "harmless"):
        where: dict[str, Any] = {"calibration": {"source": text}, "samples": text, "tokens": text}
        record = {"base_model": text, "provenance": where}
        hf.prune_checkpoint(llama_dir, tmp_path / "out", KEEP, record=record, force=True)
        cards.append((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
        assert cards[-1].replace("\n", "").isprintable()
        written = (tmp_path / "out" / "hfprune.json").read_text(encoding="utf-8")
        assert written.strip().isprintable()
        assert json.loads(written)["provenance"]["samples"] == text
    assert unescaped(cards[0]) == unescaped(cards[1])
    assert len(cards[0]) < 3000


def test_the_name_of_a_cached_model_is_the_hubs(tmp_path: Path) -> None:
    for cache, name in (
        ("models--org--some--name", "org/some--name"),
        ("models--gpt2", "gpt2"),
        ("elsewhere", "0a1b"),
    ):
        (tmp_path / cache / "snapshots" / "0a1b").mkdir(parents=True)
        assert display_name(tmp_path / cache / "snapshots" / "0a1b") == name
