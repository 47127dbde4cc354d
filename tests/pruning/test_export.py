"""Exports: what is written back and forth is the same, and what they cannot do is one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from uneven import IDS, WIDTHS, logits

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading

Export = Callable[..., dict[str, Any]]


def same_model(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    return (
        configs[0] == configs[1]
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("through", ["padded", "decilm"])
def test_there_and_back_it_is_the_same(
    pruned: Callable[..., Path], export: Export, tmp_path: Path, family: str, through: str
) -> None:
    if family == "qwen3" and through == "decilm":
        pytest.skip("refused, below")
    options = {"sliding_window": None} if family == "mistral" else {}
    custom = pruned(family, dtype=torch.float32, **options)
    done = export(custom, "--to", through, "--out", tmp_path / "other")
    assert done["mlp_widths"] == list(WIDTHS)
    expected = logits(loading.load_model(custom, device="cpu"))
    found = logits(loading.load_model(tmp_path / "other", device="cpu"))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    export(tmp_path / "other", "--to", "custom", "--out", tmp_path / "back")
    assert same_model(tmp_path / "back", custom)
    records = [
        json.loads((folder / "hfprune.json").read_text())
        for folder in (custom, tmp_path / "other", tmp_path / "back")
    ]
    for record in records[1:]:
        for name in ("keep", "base_model", "provenance"):
            assert record[name] == records[0][name]
    assert records[1]["achieved"]["layout"] == through
    assert records[2]["achieved"] == records[0]["achieved"]


def test_decilm_is_what_vllm_reads(
    pruned: Callable[..., Path], export: Export, tmp_path: Path
) -> None:
    export(pruned("qwen2"), "--to", "decilm", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert (config["attention_bias"], config["qkv_bias"]) == (False, True)
    for block, width in zip(config["block_configs"], WIDTHS, strict=True):
        assert block["ffn"]["intermediate_size"] == width
        assert "ffn_mult" not in block["ffn"]
        assert block["attention"]["n_heads_in_group"] == 2
    loaded = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [block.ffn.intermediate_size for block in loaded.block_configs] == list(WIDTHS)
    assert loaded.block_configs[0].attention.no_op is False
    ids = IDS[None] % 127
    tables = [hf.score(folder, ids) for folder in (tmp_path / "out", tmp_path / "qwen2-custom")]
    assert torch.equal(tables[0].l1, tables[1].l1)


@pytest.mark.parametrize(
    ("family", "options", "to", "message"),
    [
        ("qwen3", {}, "decilm", "layout decilm runs llama, mistral, qwen2, .* no qwen3"),
        ("mistral", {"sliding_window": 5}, "decilm", "no mistral with a sliding window"),
        ("llama", {}, "native", "native' is not one of"),
        ("llama", {}, "gguf", "no convert_hf_to_gguf.py on the PATH; git clone .*--converter"),
    ],
)
def test_what_there_is_no_form_for(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], tmp_path: Path,
    family: str, options: dict[str, Any], to: str, message: str,
) -> None:  # fmt: skip
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    run = hfprune("export", pruned(family, **options), "--to", to, "--out", out)
    assert run.code == 2
    assert re.search(message, run.err), run.err
    assert not out.exists()


def test_a_plain_checkpoint_needs_no_export(
    llama_dir: Path, hfprune: Callable[..., Any], tmp_path: Path
) -> None:
    run = hfprune("export", llama_dir, "--to", "padded", "--out", tmp_path / "out")
    assert run.code == 2
    assert "96 MLP neurons: it is a plain checkpoint" in run.err
    run = hfprune("export", llama_dir, "--to", "gguf", "--out", tmp_path / "out.gguf")
    assert run.code == 2
    assert "was not pruned: llama.cpp's convert_hf_to_gguf.py takes it as it is" in run.err


def test_a_model_that_was_saved_again_counts_nothing_as_removed(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], tmp_path: Path
) -> None:
    custom, again = pruned(), tmp_path / "again"
    loading.load_model(custom, device="cpu").save_pretrained(again)
    run = hfprune("export", again, "--to", "padded", "--out", tmp_path / "out")
    assert run.code == 0, run.err
    assert "has no hfprune.json: what was pruned is not known" in run.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| neurons removed | 0.00% |" in card
    assert "| parameters removed | 0.00% |" in card


@pytest.mark.parametrize(
    "damage",
    [
        {"achieved": None}, {"achieved": {"dense_params": 100}}, {"base_model": {"a": 1}},
        {"requested": 5}, {"requested": {"criterion": 5, "select": 7}}, {"provenance": [1]},
        {"chosen": 3}, {"fidelity": "x"}, {"fidelity": {"kl_nats": "a"}}, {"keep": [1, 2]},
        {"keep": {"0": [1]}}, {"keep": {"0": "abc", "1": "abc", "2": "abc"}},
        {"achieved.dense_params": 0}, {"achieved.dense_params": True},
        {"achieved.prune_ratio": float("nan")}, {"achieved.prune_ratio": "<b>"},
        {"achieved.intermediate_size": 95},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_one_line(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], tmp_path: Path, damage: dict[str, Any]
) -> None:
    folder = pruned()
    record = json.loads((folder / "hfprune.json").read_text())
    for name, value in damage.items():
        *groups, last = name.split(".")
        (record[groups[0]] if groups else record)[last] = value
    (folder / "hfprune.json").write_text(json.dumps(record))
    for command in (
        ["export", folder, "--to", "padded", "--out", tmp_path / "out"],
        ["report", folder, "--out", tmp_path / "out"],
    ):
        run = hfprune(*command)
        assert run.code == 2, run.out + run.err
        assert f"{folder / 'hfprune.json'} is damaged" in run.err
        assert not (tmp_path / "out").exists()


def test_a_model_with_the_record_of_its_adapters_is_not_called_damaged(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], tmp_path: Path
) -> None:
    """As when peft's merged model is saved over the adapters."""
    folder = pruned()
    (folder / "hfprune.json").write_text(json.dumps({"base_model": "demo", "recovery": {}}))
    run = hfprune("export", folder, "--to", "padded", "--out", tmp_path / "out")
    assert run.code == 2, run.out + run.err
    assert "hfprune.json is of adapters, or of a model that was not pruned by hfprune" in run.err


def test_a_padded_model_is_not_pruned_as_if_it_were_dense(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], tmp_path: Path
) -> None:
    run = hfprune(
        "prune", pruned(layout="padded"), "--criterion", "magnitude", "--prune-ratio", 0.1,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert run.code == 2
    assert "prune what `hfprune export --to custom` makes of it" in run.err


def test_the_record_of_a_large_model_is_long(
    pruned: Callable[..., Path], export: Export, tmp_path: Path
) -> None:
    record = pruned() / "hfprune.json"
    record.write_text(record.read_text() + " " * (65 << 20))
    done = export(record.parent, "--to", "padded", "--out", tmp_path / "out")
    assert done["mlp_widths"] == list(WIDTHS)
    kept = json.loads((tmp_path / "out" / "hfprune.json").read_text())["keep"]
    assert kept == json.loads(record.read_text())["keep"]
