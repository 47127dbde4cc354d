"""Names and metadata on a model card and in a record are shown, and do nothing else."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import hfprune_fast as hf
from hfprune_fast.config import PRESETS, Recipe
from hfprune_fast.console import display_name
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.model_card import model_card

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
        word = text.replace("_", "")  # which means nothing in a code span
        named = {"select": "statistic", "criterion": word, "statistic": word}
        requested = {**asdict(Recipe()), **named}
        record = {"base_model": text, "provenance": where, "requested": requested}
        record |= {"chosen": {"allocation": text}}
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


FIDELITY = {
    "text": "heldout.txt", "tokens": 1000, "kl_nats": 0.03, "ppl_dense": 31.2, "ppl_pruned": 32.1,
    "top1_agreement": 0.87,
}  # fmt: skip


@pytest.mark.parametrize("text", ["heldout.txt", *HOSTILE])
def test_the_hub_reads_the_card(llama_dir: Path, tmp_path: Path, text: str) -> None:
    (llama_dir / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en]\n---\n"
    )
    record = {"base_model": "org/some-model", "fidelity": {**FIDELITY, "text": text}}
    hf.prune_checkpoint(llama_dir, tmp_path / "out", KEEP, record=record)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    (result,) = data.pop("model-index")[0]["results"]
    assert data == {
        "base_model": "org/some-model", "base_model_relation": "finetune", "language": ["en"],
        "library_name": "transformers", "license": "other", "license_name": "own",
        "license_link": "LICENSE", "pipeline_tag": "text-generation", "tags": ["pruned", "hfprune"],
    }  # fmt: skip
    assert result["dataset"]["type"] == text[:200]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {
        "perplexity": 32.1, "perplexity_dense": 31.2, "kl_divergence": 0.03, "top1_agreement": 0.87,
    }  # fmt: skip
    assert "| perplexity | 32.10, dense 31.20 |" in card.content


def test_what_is_not_known_is_left_out(llama_dir: Path, tmp_path: Path) -> None:
    hf.prune_checkpoint(
        llama_dir, tmp_path / "out", KEEP
    )  # of a folder that has no name on the hub
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}


def test_its_tables_say_what_is_recorded() -> None:
    size = ModelSpec("llama", 2, 8, 100, 10_000, 9_000, 24)
    record: dict[str, Any] = {"base_model": "org/name", "achieved": size.pruned_to(80)}
    card = model_card(record, {})
    assert "\nbase_model: org/name\n" in card
    assert "| MLP neurons a layer | 80 of 100 |" in card
    assert "| parameters | 9,040 of 10,000 |" in card
    assert "calibration" not in card
    record |= {
        "base_model": "local",
        "requested": {**asdict(PRESETS["paper"]), "statistic": "l2"},
        "provenance": {"samples": 3, "tokens": 96, "calibration": {"source": "a.txt"}},
    }
    card = model_card(record, {})
    assert "base_model:" not in card  # a folder's name is no hub name
    assert "| ranked by | criterion `entropy`, statistic `l2` |" in card
    assert "| allocation | uniform |" in card
    assert "refitted" not in card
    default = {**record, "requested": asdict(Recipe()), "chosen": {"allocation": "measured"}}
    assert r"| allocation | measured\: one ranking, " in model_card(default, {})
    assert "| down_proj | refitted to the dense model by least squares |" in model_card(default, {})
    assert "| calibration size | 3 samples, 96 tokens |" in card
    assert model_card({**record, "provenance": {"calibration": "edited by hand"}}, {})
