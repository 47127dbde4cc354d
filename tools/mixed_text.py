"""Writes a calibration text of three kinds in nearly equal parts: prose, code and chat.

    python tools/mixed_text.py MODEL --text valid.txt --texts texts --out texts/mixed.jsonl

`texts` is a folder that `tools/texts.py` has written. So that a model calibrated on the mixture can
be measured on it with `fidelity.py --also`, every document is left out that shares a run of 8
words with the windows which that draws (`--eval-samples`, `--seq-len`, by MODEL's tokenizer), or,
if it is shorter, is there as a whole.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.data.sources import documents_of
from hfprune_fast.errors import HFPruneError

NAMES = "code.jsonl", "chat.jsonl"
RUN_WORDS = 8
MAX_CHARS_OF_A_KIND, MAX_CHARS_OF_A_DOCUMENT, MIN_CHARS_OF_AN_ARTICLE = 120_000, 20_000, 500
# The chats are a line or two each: so many are a document.
CHATS_TOGETHER = 60


def not_in(held_out: Iterable[str], texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts that share no run of words with what is held out, however it is spaced."""
    words = [text.split() for text in held_out]
    seen = {run for each in words for run in _runs(each)}
    whole = f" {' '.join(word for each in words for word in each)} "
    for text in texts:
        own = text.split()
        shared = f" {' '.join(own)} " in whole if len(own) < RUN_WORDS else seen & set(_runs(own))
        if not shared:
            yield text


def _runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1))


def mixed(code: list[str], chats: list[str], articles: list[str]) -> list[str]:
    """Return the first documents of each kind, about as many characters of one as of another."""
    code, chats, articles = (list(_first(kind)) for kind in (code, chats, articles))
    chats = [
        "\n\n".join(chats[i : i + CHATS_TOGETHER]) for i in range(0, len(chats), CHATS_TOGETHER)
    ]
    found = [*code, *chats, *articles]
    random.shuffle(found)
    return found


def _first(texts: Iterable[str]) -> Iterator[str]:
    chars = 0
    for text in texts:
        if chars >= MAX_CHARS_OF_A_KIND:
            return
        yield text[:MAX_CHARS_OF_A_DOCUMENT]
        chars += len(text[:MAX_CHARS_OF_A_DOCUMENT])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a calibration text of three kinds.")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's validation text")
    parser.add_argument("--texts", type=Path, required=True, help="folder of tools/texts.py")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write")
    parser.add_argument("--eval-samples", type=int, default=40, help="windows held out of a text")
    parser.add_argument("--seq-len", type=int, default=512, help="their tokens")
    args = parser.parse_args(argv)
    inputs = [args.text, *(args.texts / name for name in NAMES)]
    if args.out.resolve() in {file.resolve() for file in inputs}:
        parser.error(f"--out {args.out} is read; give it another name")
    try:
        documents = of_three_kinds(args)
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        args.out.write_text("".join(lines), encoding="utf-8")
    except (HFPruneError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: {len(lines)} documents", file=sys.stderr)


def of_three_kinds(args: argparse.Namespace) -> list[str]:
    """Return the documents; raise if a file is missing, or nothing of it is left."""
    articles = args.text.read_text(encoding="utf-8").split("\n = ")
    articles = [text for text in articles if len(text) > MIN_CHARS_OF_AN_ARTICLE]
    source = open_source(args.model)
    random.seed(0)
    kinds = []
    for name in NAMES:
        file = args.texts / name
        windows = calibrate(file, source, CalibrationOptions(args.eval_samples, args.seq_len))
        held_out = [source.tokenizer.decode(ids) for batch in windows.batches for ids in batch.ids]
        kinds.append(list(not_in(held_out, (each.text for each in documents_of(file)))))
        random.shuffle(kinds[-1])
    for file, kind in zip((*NAMES, args.text), (*kinds, articles), strict=True):
        if not kind:
            raise ValueError(f"{file} has no document for the mixture; give a longer text")
    return mixed(*kinds, articles)


if __name__ == "__main__":
    main()
