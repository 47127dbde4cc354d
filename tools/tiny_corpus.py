"""The texts from which `tiny_model.py` trains, and which it ships.

The corpus is the documentation that every machine with the package already has: the docstrings of
Python's standard library and the texts of its `help()` topics, and the docstrings of numpy, torch,
transformers and huggingface_hub. They are read from the sources with `ast`; nothing is imported.
A document is one module (or one help topic). A paragraph is used once, and no run of twelve words
in the held-out or calibration text occurs in the training text, so the held-out loss is honest.
"""

import ast
import hashlib
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("huggingface_hub", "numpy", "torch", "transformers")
SKIPPED_FOLDERS = {"_bundled", "idlelib", "lib2to3", "site-packages", "test", "testing", "tests"}
SHIPPED_CHARS = 70_000  # of each shipped text: about 25,000 tokens
SHINGLE_WORDS = 12


class Corpus(NamedTuple):
    """Documents by name; the three parts share no paragraph."""

    train: dict[str, str]
    calibration: dict[str, str]
    heldout: dict[str, str]

    def sha256(self) -> str:
        parts = [sorted(part.items()) for part in self]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def module_docstrings(root: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Each module under `root`, sorted by path, with its docstrings in the order of the source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith("test_"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        name = ".".join((prefix, *parts))
        yield name, "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
        if name.endswith("pydoc_data.topics"):
            assign = next(node for node in tree.body if isinstance(node, ast.Assign))
            for topic, text in sorted(ast.literal_eval(assign.value).items()):
                yield f"{name}.{topic}", text


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_WORDS words, whatever the case, spacing and punctuation."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    runs = (words[i : i + SHINGLE_WORDS] for i in range(max(1, len(words) - SHINGLE_WORDS + 1)))
    return {hash(tuple(run)) for run in runs}


def gather() -> Corpus:
    """Reads the corpus; Python's own documents with the lowest hashes are set aside, unseen."""
    warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the sources being parsed
    warnings.simplefilter("ignore", DeprecationWarning)
    paths = sysconfig.get_paths()
    python = dict(module_docstrings(Path(paths["stdlib"]), "python"))
    others: dict[str, str] = {}
    for package in PACKAGES:
        folder = Path(paths["purelib"]) / package
        if not folder.is_dir():  # importable from elsewhere: the corpus would silently be smaller
            raise SystemExit(f"{package}: expected its sources in {folder}, got none")
        others.update(module_docstrings(folder, package))
    seen_paragraphs: set[str] = set()
    shipped_shingles: set[int] = set()

    def fresh(text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(re.findall(r"\w+", paragraph.lower()))
            if key and key not in seen_paragraphs and not shingles(paragraph) & shipped_shingles:
                seen_paragraphs.add(key)
                kept.append(paragraph.strip("\n"))
        return "\n\n".join(kept)

    # Modules that carry an author's own notice are left to training: only PSF text is shipped.
    candidates = sorted(
        (name for name, text in python.items() if not re.search(r"(?i)copyright|\w@\w", text)),
        key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
    )
    shipped: list[dict[str, str]] = []
    for _ in ("heldout", "calibration"):
        part: dict[str, str] = {}
        while sum(map(len, part.values())) < SHIPPED_CHARS:
            name = candidates.pop(0)
            if 1_000 <= len(python[name]) <= 12_000:  # many documents, none of which dominates
                part[name] = fresh(python.pop(name))
        shipped_shingles.update(*map(shingles, part.values()))
        shipped.append(part)
    train = {name: fresh(text) for name, text in (python | others).items()}
    heldout, calibration = shipped
    return Corpus({name: text for name, text in train.items() if text}, calibration, heldout)


def notice() -> str:
    """Where the texts come from; the PSF asks that its agreement stays with its text."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text(encoding="utf-8")
    pattern = r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n.*?(?=\s+BEOPEN)"
    agreement = re.search(pattern, text, re.DOTALL)
    if agreement is None:
        raise SystemExit("LICENSE.txt of Python's standard library: expected the PSF agreement")
    return NOTICE.format(python=platform.python_version()) + agreement.group() + "\n"


NOTICE = """\
calibration.txt and heldout.txt are documentation strings and help() topics of Python {python},
Copyright (c) 2001 and later, Python Software Foundation; All Rights Reserved. They are used under
the PSF License Agreement below. What was changed: documents were selected, repeated paragraphs
were dropped and the rest was joined.

The tokenizer and the weights were trained on other documentation strings of Python (PSF License)
and on those of numpy and torch (BSD-3-Clause), transformers and huggingface_hub (Apache-2.0).
None of that text is shipped.

"""
