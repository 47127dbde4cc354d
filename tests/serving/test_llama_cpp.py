"""Pruned models as GGUF files in llama.cpp: the same tokens, and transformers' logits."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served import (
    MIXTURES,
    RANDOM,
    TRAINED,
    Reference,
    Row,
    hfprune,
    perplexity,
    random_mixture,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hfprune_fast.checkpoint import gguf_converter
from hfprune_fast.checkpoint.folder import TINY_MODEL

llama_cpp = pytest.importorskip("llama_cpp")
CONVERTER = os.environ.get("HFPRUNE_CONVERTER", "")
TEXT = (TINY_MODEL / "heldout.txt").read_text(encoding="utf-8")
# Of llama.h: how the file types are called in llama_model_quantize.
FILE_TYPES = {"Q8_0": 7, "Q4_K_M": 15}


def loaded(file: Path) -> Any:
    return llama_cpp.Llama(
        str(file), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )


def convert(folder: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-P", gguf_converter.__file__, CONVERTER]
    subprocess.run([*command, str(folder), "--outfile", str(out), *options], check=True)


def log_probs(llama: Any, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.log_softmax(torch.tensor(llama.scores[: len(ids)]).double(), dim=-1)


def row(model: str, form: str, file: Path, expected: Reference) -> Row:
    found = log_probs(loaded(file), expected.ids)
    kl = (expected.log_probs.exp() * (expected.log_probs - found)).sum(dim=-1).mean()
    same = expected.log_probs.argmax(dim=-1) == found.argmax(dim=-1)
    return Row(
        model, form, "llama.cpp", perplexity(found, expected.ids), expected.perplexity,
        kl=float(kl), top1=float(same.double().mean()), bytes=file.stat().st_size,
    )  # fmt: skip


@pytest.fixture(scope="session")
def gguf_of(pruned: Callable[[str, str], Path], tmp_path_factory: Any) -> Callable[..., Path]:
    files: dict[tuple[str, str], Path] = {}

    def make(model: str, how: str) -> Path:
        scratch = tmp_path_factory.mktemp("gguf")
        out = scratch / f"{model}-{how}.gguf"
        if (model, how) not in files:
            source, more = pruned(model, how), ["--converter", CONVERTER]
            if model in RANDOM:  # a file of the user's own, in float32
                hfprune("export", source, "--to", "padded", "--out", scratch / "padded")
                source, more = scratch / "padded.gguf", []
                convert(scratch / "padded", source, "--outtype", "f32")
            hfprune("export", source, "--to", "gguf", "--out", out, *more)
            files[model, how] = out
        return files[model, how]

    return make


@pytest.mark.parametrize("how", ["default", "uniform"])
@pytest.mark.parametrize("model", [*TRAINED, *RANDOM])
def test_llama_cpp_computes_what_transformers_does(
    model: str, how: str, pruned: Any, gguf_of: Any, transformers_of: Any, keep: Any
) -> None:
    if model in RANDOM and how == "uniform":
        pytest.skip("nothing of ours is in it")
    folder, file = pruned(model, how), gguf_of(model, how)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TEXT[5000:10000]
    llama = loaded(file)
    for special in (False, True):
        tokens = llama.tokenize(text.encode(), add_bos=special, special=False)
        assert tokens == tokenizer(text, add_special_tokens=special)["input_ids"]
    found = row(model, how, file, transformers_of(folder))
    keep(found)
    assert found.kl is not None
    assert found.kl < 1e-4
    assert found.top1 is not None
    assert found.top1 >= 0.99
    # llama.cpp rounds the activations of bf16 weights to bf16; those of random models are float32.
    assert math.isclose(
        found.perplexity, found.transformers, rel_tol=1e-4 if model in RANDOM else 0.01
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_llama_cpp_takes_fewer_and_narrower_experts(
    family: str, transformers_of: Any, keep: Any, tmp_path: Path
) -> None:
    random_mixture(family).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "dense")
    pruned, file = tmp_path / "pruned", tmp_path / "pruned.gguf"
    text = ["--calibration", TINY_MODEL / "calibration.txt", "--samples", 32, "--seq-len", 256]
    budget = ["--expert-ratio", 0.25, "--prune-ratio", 0.25]
    done = hfprune("prune", tmp_path / "dense", *text, *budget, "--out", pruned)
    assert (done["experts"], done["expert_width"]) == (6, 192)
    convert(pruned, file, "--outtype", "f32")
    found = row(family, "fewer and narrower experts", file, transformers_of(pruned))
    keep(found)
    assert found.kl is not None
    assert found.kl < 1e-4
    # In 16 bits, as an export is by default, a few tokens choose other experts.
    hfprune("export", pruned, "--to", "gguf", "--out", file, "--converter", CONVERTER, "--force")
    exported = row(family, "exported", file, transformers_of(pruned)).kl
    assert exported is not None
    assert exported < 0.01


@pytest.mark.parametrize("quantised", FILE_TYPES)
@pytest.mark.parametrize("model", TRAINED)
def test_a_quantised_pruned_file_is_smaller_than_the_dense_one(
    model: str, quantised: str, dense: Any, pruned: Any, gguf_of: Any, transformers_of: Any,
    keep: Any, tmp_path: Path,
) -> None:  # fmt: skip
    # That of an untied qwen3 is padded to its widest layer, which may be as wide as a dense one.
    how = "uniform" if model == "qwen3" else "default"
    dense_file = tmp_path / "dense.gguf"
    convert(dense(model), dense_file)
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    quantise(gguf_of(model, how), small, quantised)
    quantise(dense_file, large, quantised)
    form = f"{how}, {quantised}"
    found = row(model, form, small, transformers_of(pruned(model, how)))
    keep(Row(**{**vars(found), "dense_bytes": large.stat().st_size}))
    assert small.stat().st_size < large.stat().st_size
    assert found.perplexity < 1.2 * found.transformers


def bpe(name: str, folder: Path) -> Any:
    """Return a tokenizer of the shipped text that splits it by llama.cpp's rules of this name."""
    numbers = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.get(name)
    words = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=numbers is None)
    first: list[Any] = [pre_tokenizers.Split(Regex(words), "isolated")] if numbers else []
    first += [pre_tokenizers.Digits(True)] if name == "smollm" else []
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes]) if first else to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|bos|>", "<|eos|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>"
    )
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_rules_by_name_are_llama_cpps(name: str, dense: Any, tmp_path: Path) -> None:
    tokenizer = bpe(name, tmp_path)
    config = json.loads((dense("mistral") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gguf_converter.rules_of(json.loads((tmp_path / "tokenizer.json").read_text())) == name
    convert(tmp_path, tmp_path / "vocab.gguf", "--vocab-only")
    llama = llama_cpp.Llama(str(tmp_path / "vocab.gguf"), vocab_only=True, verbose=False)
    text = TEXT[:20_000] + "  12345 1.5e-7\t\n\n  don't WE'LL über 東京2024年   \n x"
    found = llama.tokenize(text.encode(), add_bos=False, special=False)
    assert found == tokenizer(text, add_special_tokens=False)["input_ids"]


def quantise(file: Path, out: Path, name: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[name], 1
    assert llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), parameters) == 0
