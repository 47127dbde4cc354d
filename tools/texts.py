"""Writes texts of other kinds than a model was calibrated on, to measure it on: code and chat.

    python tools/texts.py --out DIR

DIR/code.jsonl has the modules of Python's standard library on this machine, a source with its
docstrings a line; another version of Python has others. DIR/chat.jsonl has the English exchanges of
the PyPI package `chatterbot-corpus` (BSD 3-clause licence), where it is installed. It is not a
dependency of ours, and is read without being imported:

    pip install --no-deps chatterbot-corpus

    python bench/fidelity/fidelity.py MODEL ... --also code=DIR/code.jsonl chat=DIR/chat.jsonl
"""

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

PACKAGE = "chatterbot_corpus"
# What is no text to learn Python from, or is not the standard library's.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
# So that no module is more than a small part of the text.
MAX_CHARS = 40_000


def modules(library: Path) -> Iterator[dict[str, Any]]:
    """Yield the source of each module of a standard library, in the order of their names."""
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(library).parts[:-1]):
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            if text:
                yield {"text": text[:MAX_CHARS]}


def packaged_chats() -> list[Path]:
    """Return the English files of the installed package, which is not imported."""
    spec = find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    return [
        file for folder in folders for file in sorted(Path(folder, "data/english").glob("*.yml"))
    ]


def chats(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield each conversation of the corpus as messages, user and assistant in turn."""
    for file in files:
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            said = [str(turn).strip() for turn in turns]
            roles = ("user", "assistant") * len(said)
            yield {
                "messages": [
                    {"role": role, "content": each}
                    for role, each in zip(roles, said, strict=False)
                    if each
                ]
            }


def write(file: Path, documents: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} documents", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write texts of code and of chat.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write them to")
    args = parser.parse_args(argv)
    write(args.out / "code.jsonl", modules(Path(sysconfig.get_paths()["stdlib"])))
    files = packaged_chats()
    if files:
        write(args.out / "chat.jsonl", chats(files))
    else:
        print("no chat: pip install --no-deps chatterbot-corpus", file=sys.stderr)


if __name__ == "__main__":
    main()
