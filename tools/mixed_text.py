"""Writes a calibration text of three kinds in equal parts: prose, code and chat.

    python tools/mixed_text.py MODEL --text valid.txt --texts texts --out texts/mixed.jsonl

`texts` is a folder that `tools/texts.py` has written, and MODEL's tokenizer is used. So that a model
calibrated on the mixture can be measured on `texts` with `fidelity.py --also`, every document is
left out that shares a run of 24 tokens with the windows which that draws (`--eval-samples`,
`--seq-len`); of a document of fewer tokens, all of it.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.calibration import calibrate

RUN_TOKENS = 24
MAX_CHARS_OF_A_KIND, MAX_CHARS_OF_A_DOCUMENT, MIN_CHARS_OF_AN_ARTICLE = 400_000, 20_000, 500
# The chats are a line or two each: so many are a document.
CHATS_TOGETHER = 60


def documents(file: Path) -> Iterator[str]:
    """Yield the documents of a file of `tools/texts.py`, a chat as `role: content` lines."""
    for line in file.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        if "messages" in found:
            yield "\n".join(f"{each['role']}: {each['content']}" for each in found["messages"])
        else:
            yield found["text"]


def not_in(held_out: list[list[int]], texts: Iterable[str], source: ModelSource) -> Iterator[str]:
    """Yield the texts that share no run of tokens with the windows, or no words if they are short.

    Args:
        held_out: token ids of the windows.
        texts: what to choose from.
        source: whose tokenizer the windows are of.
    """
    whole = " ".join(source.tokenizer.decode(window) for window in held_out)
    seen = {run for window in held_out for run in _runs(window)}
    for text in texts:
        ids = source.tokenizer(text)["input_ids"]
        if len(ids) < RUN_TOKENS:
            shared = text.strip() in whole
        else:
            shared = any(run in seen for run in _runs(ids))
        if not shared:
            yield text


def _runs(ids: list[int]) -> Iterator[tuple[int, ...]]:
    return (tuple(ids[i : i + RUN_TOKENS]) for i in range(len(ids) - RUN_TOKENS + 1))


def mixed(code: list[str], chats: list[str], articles: list[str]) -> list[str]:
    """Return documents of each kind, as many characters of one as of another, in random order.

    The first of each list are taken, up to the length of the shortest.
    """
    kinds = (code, chats, articles)
    chars = min(MAX_CHARS_OF_A_KIND, *(sum(map(len, kind)) for kind in kinds))
    code, chats, articles = (list(_first(kind, chars)) for kind in kinds)
    chats = [
        "\n\n".join(chats[i : i + CHATS_TOGETHER]) for i in range(0, len(chats), CHATS_TOGETHER)
    ]
    found = [text[:MAX_CHARS_OF_A_DOCUMENT] for text in (*code, *chats, *articles)]
    random.shuffle(found)
    return found


def _first(texts: Iterable[str], chars: int) -> Iterator[str]:
    for text in texts:
        if chars <= 0:
            return
        yield text
        chars -= len(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a calibration text of three kinds.")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's validation text")
    parser.add_argument("--texts", type=Path, required=True, help="folder of tools/texts.py")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write")
    parser.add_argument("--eval-samples", type=int, default=40, help="windows held out of a text")
    parser.add_argument("--seq-len", type=int, default=512, help="their tokens")
    args = parser.parse_args(argv)
    source = open_source(args.model)
    random.seed(0)
    kinds = []
    for name in ("code.jsonl", "chat.jsonl"):
        file = args.texts / name
        windows = calibrate(file, source, CalibrationOptions(args.eval_samples, args.seq_len))
        held_out = [ids for batch in windows.batches for ids in batch.ids.tolist()]
        kinds.append(list(not_in(held_out, documents(file), source)))
        random.shuffle(kinds[-1])
    articles = args.text.read_text(encoding="utf-8").split("\n = ")
    articles = [text for text in articles if len(text) > MIN_CHARS_OF_AN_ARTICLE]
    lines = [json.dumps({"text": text}) + "\n" for text in mixed(*kinds, articles)]
    args.out.write_text("".join(lines), encoding="utf-8")
    print(f"{args.out}: {len(lines)} documents", file=sys.stderr)


if __name__ == "__main__":
    main()
