"""Exports: what is written back and forth is the same, and what they cannot do is one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from truth import tiny_model
from uneven import IDS, WIDTHS, keep_of, logits

import hfprune_fast as hf
from hfprune_fast.checkpoint import gguf_file, loading
from hfprune_fast.errors import ArgumentError, CheckpointError

Export = Callable[..., dict[str, Any]]


@pytest.fixture
def export(hfprune: Callable[..., Any]) -> Export:
    def run(*arguments: Any) -> dict[str, Any]:
        done = hfprune("export", *arguments, "--json")
        assert done.code == 0, done.err
        found: dict[str, Any] = done.json()
        return found

    return run


@pytest.fixture
def pruned(save_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(family: str = "llama", layout: str = "custom", **options: Any) -> Path:
        dense = save_checkpoint(tiny_model(family, **options), f"dense-{family}")
        out = tmp_path / f"{family}-{layout}"
        hf.prune_checkpoint(
            dense, out, keep_of(), layout=layout, record={"provenance": {"tokens": 7}}
        )
        return out

    return make


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


def padded_gguf(
    file: Path, architecture: str, *, tied: bool = True, more: str = ""
) -> dict[str, Any]:
    """Write a GGUF file as llama.cpp's converter does of a padded model; return its tensors."""
    rng = np.random.default_rng(0)
    D, F, heads, kv, V = 16, 96, 4, 2, 40
    shapes = {"attn_q.weight": (D, D), "attn_k.weight": (D // 2, D), "attn_v.weight": (D // 2, D)}
    shapes |= {"ffn_gate.weight": (F, D), "ffn_up.weight": (F, D), "ffn_down.weight": (D, F)}
    shapes |= {"attn_norm.weight": (D,)}
    if architecture == "qwen2":
        shapes |= {"attn_q.bias": (D,), "attn_k.bias": (D // 2,)}
    tensors = {"token_embd.weight": rng.standard_normal((V, D)).astype(np.float16)}
    if more:
        tensors[more] = np.zeros(F, dtype=np.float32)
    if not tied:
        tensors["output.weight"] = rng.standard_normal((V, D)).astype(np.float16)
    for layer, width in enumerate(WIDTHS):
        for name, shape in shapes.items():
            kind = np.float32 if len(shape) == 1 else np.float16
            tensor = rng.standard_normal(shape).astype(kind)
            if name.startswith("ffn_down"):
                tensor[:, width:] = 0
            elif name.startswith("ffn"):
                tensor[width:] = 0
            tensors[f"blk.{layer}.{name}"] = tensor
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(len(WIDTHS))
    writer.add_feed_forward_length(F)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_token_list(["a", "b"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_narrow_gguf_file_has_all_but_the_padding(
    tmp_path: Path, export: Export, architecture: str
) -> None:
    tensors = padded_gguf(tmp_path / "padded.gguf", architecture)
    done = export(tmp_path / "padded.gguf", "--to", "gguf", "--out", tmp_path / "out.gguf")
    assert done["mlp_widths"] == list(WIDTHS)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    target = {"llama": "deci", "qwen2": "deci", "qwen3": "openelm"}[architecture]
    assert reader.fields["general.architecture"].contents() == target
    assert reader.fields[f"{target}.feed_forward_length"].contents() == list(WIDTHS)
    assert reader.fields[f"{target}.attention.head_count"].contents() == 4
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    found = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    for layer, width in enumerate(WIDTHS):
        for part in ("gate", "up"):
            name = f"blk.{layer}.ffn_{part}.weight"
            assert np.array_equal(found.pop(name), tensors.pop(name)[:width])
        name = f"blk.{layer}.ffn_down.weight"
        assert np.array_equal(found.pop(name), tensors.pop(name)[:, :width])
        q, k, v = (f"blk.{layer}.attn_{letter}.weight" for letter in "qkv")
        if architecture == "qwen2":  # halves of a head become neighbours
            for name, heads in ((q, 4), (k, 2)):
                for each in (name, name.replace("weight", "bias")):
                    ours, theirs = found.pop(each), tensors.pop(each)
                    half = len(theirs) // heads // 2
                    for row in range(len(theirs)):
                        head, place = divmod(row, 2 * half)
                        pair, second = divmod(place, 2)
                        source = head * 2 * half + second * half + pair
                        assert np.array_equal(ours[row], theirs[source])
        if architecture == "qwen3":
            joined = found.pop(f"blk.{layer}.attn_qkv.weight")
            assert np.array_equal(joined, np.concatenate([tensors.pop(n) for n in (q, k, v)]))
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize(
    ("architecture", "tied", "message"),
    [("qwen3", False, "of architecture qwen3, for which"), ("gemma", True, "of architecture gem")],
)
def test_architectures_without_a_width_for_each_layer(
    tmp_path: Path, architecture: str, tied: bool, message: str
) -> None:
    padded_gguf(tmp_path / "padded.gguf", architecture, tied=tied)
    assert gguf_file.target_of_file(tmp_path / "padded.gguf") is None
    with pytest.raises(ArgumentError, match=message):
        gguf_file.narrow(tmp_path / "padded.gguf", tmp_path / "out.gguf")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tensors_that_have_no_place_are_refused(tmp_path: Path, architecture: str) -> None:
    """A bias of the MLP, for one, would be cut by its bytes."""
    for name in ("blk.0.ffn_gate.bias", "blk.0.ffn_gate_exps.weight", "extra.weight"):
        padded_gguf(tmp_path / "padded.gguf", architecture, more=name)
        with pytest.raises(ArgumentError, match=f"has {name}, which has no place"):
            gguf_file.narrow(tmp_path / "padded.gguf", tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


def test_a_damaged_gguf_file(tmp_path: Path, hfprune: Callable[..., Any]) -> None:
    padded_gguf(tmp_path / "padded.gguf", "llama")
    data = (tmp_path / "padded.gguf").read_bytes()
    for size in (0, 3, 100, len(data) // 2):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="is not a GGUF file of a padded model"):
            gguf_file.narrow(tmp_path / "cut.gguf", tmp_path / "out.gguf")
    run = hfprune(
        "export", tmp_path / "cut.gguf", "--to", "gguf", "--out", tmp_path / "cut.gguf", "--force"
    )
    assert run.code == 2
    assert "which is never written to" in run.err
    (tmp_path / "mine.gguf").write_text("notes")
    run = hfprune(
        "export", tmp_path / "padded.gguf", "--to", "gguf", "--out", tmp_path / "mine.gguf",
        "--force",
    )  # fmt: skip
    assert run.code == 2
    assert "is not a GGUF file; --force replaces only those" in run.err


CONVERTER = """
import shutil, sys
from pathlib import Path

class TextModel:
    dir_model = Path(sys.argv[1])
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")

def main():
    folder, _, out = sys.argv[1:4]
    assert (Path(folder) / "config.json").exists()
    assert TextModel().get_vocab_base_pre(None) == "gpt-2"
    shutil.copyfile({padded!r}, out)
"""


def test_a_folder_is_padded_converted_and_narrowed(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], export: Export, tmp_path: Path
) -> None:
    padded_gguf(tmp_path / "padded.gguf", "llama")
    (tmp_path / "llama.cpp").mkdir()
    converter, out = tmp_path / "llama.cpp/convert_hf_to_gguf.py", tmp_path / "out.gguf"
    model = pruned()
    arguments = [model, "--to", "gguf", "--out", out, "--converter", converter.parent]
    converter.write_text("import none_such")
    run = hfprune("export", *arguments)
    assert run.code == 2
    assert "failed: ModuleNotFoundError: No module named 'none_such'" in run.err
    converter.write_text(CONVERTER.format(padded=str(tmp_path / "padded.gguf")))
    assert export(*arguments)["mlp_widths"] == list(WIDTHS)
    assert out.stat().st_size < (tmp_path / "padded.gguf").stat().st_size
    padded_gguf(tmp_path / "padded.gguf", "qwen3", tied=False)
    run = hfprune("export", *arguments, "--force", "--json")
    assert "no form of llama with a width for each layer; the file is padded" in run.err
    assert run.json()["mlp_widths"] == [96, 96, 96]
    assert out.read_bytes() == (tmp_path / "padded.gguf").read_bytes()
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    run = hfprune("export", *arguments, "--force")
    assert run.code == 2
    assert "failed: NotImplementedError: BPE pre-tokenizer was not recognized" in run.err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
