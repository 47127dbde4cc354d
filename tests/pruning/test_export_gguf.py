"""GGUF exports: what is narrowed, and what cannot be is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from padded_gguf import padded_gguf
from uneven import WIDTHS

from hfprune_fast.checkpoint import gguf_file
from hfprune_fast.errors import ArgumentError, CheckpointError

Export = Callable[..., dict[str, Any]]


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


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    path = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    path.parent.mkdir()
    path.write_text(CONVERTER.format(padded=str(tmp_path / "padded.gguf")))
    return path


@pytest.mark.parametrize("layout", ["custom", "padded"])
def test_a_folder_is_padded_converted_and_narrowed(
    pruned: Callable[..., Path], export: Export, converter: Path, tmp_path: Path, layout: str
) -> None:
    padded_gguf(tmp_path / "padded.gguf", "llama")
    out = tmp_path / "new/out.gguf"
    arguments = ["--to", "gguf", "--out", out, "--converter", converter.parent]
    assert export(pruned(layout=layout), *arguments)["mlp_widths"] == list(WIDTHS)
    assert out.stat().st_size < (tmp_path / "padded.gguf").stat().st_size


def test_a_file_that_cannot_be_narrowed_stays_padded(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], converter: Path, tmp_path: Path
) -> None:
    padded_gguf(tmp_path / "padded.gguf", "qwen3", tied=False)
    out = tmp_path / "out.gguf"
    run = hfprune(
        "export", pruned(), "--to", "gguf", "--out", out, "--converter", converter, "--json"
    )
    assert "no form of llama with a width for each layer; the file is padded" in run.err
    assert run.json()["mlp_widths"] == [96, 96, 96]
    assert out.read_bytes() == (tmp_path / "padded.gguf").read_bytes()


@pytest.mark.parametrize("fault", ["module", "junk", "tokenizer"])
def test_a_converter_that_fails_is_one_line(
    pruned: Callable[..., Path], hfprune: Callable[..., Any], converter: Path, tmp_path: Path,
    fault: str,
) -> None:  # fmt: skip
    model, out = pruned(), tmp_path / "out.gguf"
    if fault == "module":
        converter.write_text("import none_such")
        expected = "failed: ModuleNotFoundError: No module named 'none_such'"
    elif fault == "junk":
        (tmp_path / "padded.gguf").write_text("junk")
        expected = "convert_hf_to_gguf.py wrote no GGUF file"
    else:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        expected = "failed: NotImplementedError: BPE pre-tokenizer was not recognized"
    run = hfprune("export", model, "--to", "gguf", "--out", out, "--converter", converter.parent)
    assert run.code == 2
    assert expected in run.err
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_file_that_is_not_there_or_narrow_already(
    hfprune: Callable[..., Any], export: Export, tmp_path: Path
) -> None:
    padded_gguf(tmp_path / "padded.gguf", "llama")
    narrow = tmp_path / "new" / "narrow.gguf"
    export(tmp_path / "padded.gguf", "--to", "gguf", "--out", narrow)
    for source, message in (
        (tmp_path / "none.gguf", "there is no file"),
        (narrow, "has a width for each layer already"),
    ):
        run = hfprune("export", source, "--to", "gguf", "--out", tmp_path / "out.gguf")
        assert run.code == 2
        assert message in run.err
