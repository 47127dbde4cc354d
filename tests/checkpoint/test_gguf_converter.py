"""The rules by which a tokenizer splits text, by llama.cpp's name for them."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from hfprune_fast.checkpoint.gguf_converter import rules_of

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(numbers: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(WORDS.replace("NUMBERS", numbers)), "isolated")
    return pre_tokenizers.Sequence([words, BYTES_ONLY])


def tokenizer_json(
    pre: pre_tokenizers.PreTokenizer, *, nfc: bool = False, whole_words: bool = False
) -> dict[str, object]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    found: dict[str, object] = json.loads(tokenizer.to_str())
    return found


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("gpt-2", tokenizer_json(BYTES)),
        ("smollm", tokenizer_json(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES]))),
        ("llama-bpe", tokenizer_json(split(r"\p{N}{1,3}"), whole_words=True)),
        ("qwen2", tokenizer_json(split(r"\p{N}"), nfc=True)),
        (None, tokenizer_json(split(r"\p{N}"))),
        (None, tokenizer_json(split(r"\p{N}{1,3}"))),
        (None, tokenizer_json(split(r"\p{N}{1,2}"), whole_words=True)),
        (None, tokenizer_json(BYTES, nfc=True)),
        (None, tokenizer_json(BYTES, whole_words=True)),
        (None, tokenizer_json(pre_tokenizers.ByteLevel(add_prefix_space=True))),
        (None, tokenizer_json(pre_tokenizers.Whitespace())),
        (None, tokenizer_json(BYTES) | {"model": {"type": "Unigram"}}),
        (None, tokenizer_json(BYTES) | {"model": {"type": "BPE", "byte_fallback": True}}),
        (None, tokenizer_json(BYTES) | {"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}),
    ],
)
def test_rules_have_llama_cpps_name(name: str | None, tokenizer: dict[str, object]) -> None:
    assert rules_of(tokenizer) == name
