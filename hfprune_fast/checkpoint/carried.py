"""The files beside the weights that belong to a model: what is pruned from it carries them too."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from hfprune_fast.checkpoint.ours import real
from hfprune_fast.errors import CheckpointError

_TEMPLATES = "additional_chat_templates"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v[0-9]*"),
    *("spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json"),
    *("chat_template.json", "chat_template.jinja", f"{_TEMPLATES}/*.jinja"),
)
_MAX_TOKENIZER_BYTES = 1 << 30
_OTHERS = ("generation_config.json", "processor_config.json", "*preprocessor_config.json")
# In upper or lower case, of the suffixes that texts have.
_LICENCES = ("licen[cs]e*", "*notice*", "copying*", "copyright*", "use_policy*")
_TEXT_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf")


def carry(folder: Path, out: Path, made_anew: Iterable[str]) -> list[str]:
    """Copy what belongs to the model of a folder, and return the names of what was left out.

    A link is followed within the folder and, in a hub cache, to the cache's blobs; one that leads
    anywhere else is left out.

    Args:
        made_anew: names that are not missed, since the output has its own, or needs none.
    """
    left_out = []
    paths = [path for path in folder.iterdir() if path.name != _TEMPLATES]
    if (folder / _TEMPLATES).is_dir():
        paths += (folder / _TEMPLATES).iterdir()
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _belongs_to_a_model(name) and _is_within(path, folder):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)
        elif name not in made_anew and not name.startswith("."):
            left_out.append(name)
    return left_out


def check_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are pipes, devices, broken links or of any size."""
    for path in (*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")):
        if not _matches(path.relative_to(folder).as_posix(), _TOKENIZER):
            continue
        if not path.is_file() or path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path} is no regular file, or larger than any tokenizer's")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _belongs_to_a_model(name: str) -> bool:
    lower = name.lower()
    is_text = Path(lower).suffix in _TEXT_SUFFIXES and "/" not in lower
    return _matches(name, (*_TOKENIZER, *_OTHERS)) or (is_text and _matches(lower, _LICENCES))


def _is_within(path: Path, folder: Path) -> bool:
    """Return whether a file is in its folder, or links to a blob of the hub cache that this is."""
    target, home = real(path), real(folder)
    cache = home.parent.parent
    in_cache = home.parent.name == "snapshots" and cache.name.startswith("models--")
    return home in target.parents or (in_cache and target.parent == real(cache / "blobs"))
