"""Runs llama.cpp's convert_hf_to_gguf.py, also for tokenizers missing from its built-in list.

    python -P gguf_converter.py CONVERTER ARGUMENTS...

llama.cpp splits text into words by rules of its own, which a GGUF file names (tokenizer.ggml.pre).
The converter takes the name from a hash of token ids, so it knows the vocabularies in its list and
refuses any other. Those it refuses get the name of the rules that tokenizer.json spells out, where
llama.cpp has the same rules; other rules stay refused.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": f"{_CONTRACTIONS}|{_LETTERS}|{numbers}|{_REST}"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
_DIGITS_FIRST = {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(use_regex=True)]}
# llama.cpp's rules by name, in the words of tokenizer.json: normalizer, pre_tokenizer, and whether
# a word that is in the vocabulary is taken whole, before any merge.
_RULES = {
    "gpt-2": (None, _byte_level(use_regex=True), False),
    "smollm": (None, _DIGITS_FIRST, False),
    "llama-bpe": (None, _split(r"\p{N}{1,3}"), True),
    "qwen2": ({"type": "NFC"}, _split(r"\p{N}"), False),  # llama.cpp leaves NFC to its user
}


# What changes tokens in tokenizer.json's BPE and has no counterpart in llama.cpp's.
_FOREIGN = ("byte_fallback", "continuing_subword_prefix", "dropout", "end_of_word_suffix")


def rules_of(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for how a tokenizer.json splits text, if it has the same rules."""
    model = tokenizer["model"]
    pre_tokenizer = _without_offsets(tokenizer.get("pre_tokenizer"))
    found = (tokenizer.get("normalizer"), pre_tokenizer, bool(model.get("ignore_merges")))
    names = [name for name, rules in _RULES.items() if rules == found]
    is_plain = model["type"] == "BPE" and not any(model.get(name) for name in _FOREIGN)
    return names[0] if names and is_plain else None


def _without_offsets(value: Any) -> Any:
    """Return JSON without `trim_offsets`, which changes no tokens."""
    if isinstance(value, dict):
        return {key: _without_offsets(each) for key, each in value.items() if key != "trim_offsets"}
    return [_without_offsets(each) for each in value] if isinstance(value, list) else value


def main(converter: str, *arguments: str) -> None:
    """Run the converter with these arguments."""
    sys.argv = [converter, *arguments]
    sys.path.insert(0, str(Path(converter).parent))
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", converter)
    if spec is None or spec.loader is None:
        raise ImportError(f"{converter} is not a Python file")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The class is in the script itself or, since 2026, in a package beside it.
    text_model: Any = sys.modules.get("conversion.base", module).TextModel
    known = text_model.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            name: str = known(self, tokenizer)
        except NotImplementedError:
            path = Path(self.dir_model) / "tokenizer.json"
            rules = rules_of(json.loads(path.read_text(encoding="utf-8")))
            if rules is None:
                raise
            return rules
        return name

    text_model.get_vocab_base_pre = get_vocab_base_pre
    module.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
