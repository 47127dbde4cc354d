"""What the model card of a source says of its licence and languages: read without trust."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfprune_fast.console import say
from hfprune_fast.errors import one_line

CARD = "README.md"
_MAX_BYTES = 256 << 10
_MAX_DEPTH, _MAX_LANGUAGES = 16, 300
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n((?:.*?\n)?)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_NAME = re.compile(r"[\w.+-]{1,100}", re.ASCII)
_LINK = re.compile(r"[\w.:/%#?&=~+-]{1,300}", re.ASCII)


def source_card(folder: Path) -> dict[str, Any]:
    """Return license, license_name, license_link and language of a folder's README.md.

    Only those that are there and are names, links or lists of names; a file whose front matter
    cannot be read is ignored, with a line on stderr.
    """
    path = folder / CARD
    try:
        found = _front_matter(path)
    except (OSError, ValueError, RecursionError) as error:
        say(f"{path} is ignored, so the model card has no licence: {one_line(error)}")
        return {}
    forms = {"license": _NAME, "license_name": _NAME, "license_link": _LINK}
    facts: dict[str, Any] = {
        name: found[name]
        for name, form in forms.items()
        if isinstance(found.get(name), str) and form.fullmatch(found[name])
    }
    languages = found.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and len(languages) <= _MAX_LANGUAGES:
        codes = [code for code in languages if isinstance(code, str) and _NAME.fullmatch(code)]
        facts |= {"language": codes} if codes else {}
    return facts


def _front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML between the two lines of dashes that a card begins with; {} without one."""
    import yaml

    if not path.is_file():  # none, or a pipe
        return {}
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if not data.removeprefix(b"\xef\xbb\xbf").startswith(b"---"):
        return {}
    # A card's text may be longer than what is read, and a character cut in two there.
    text = data.decode("utf-8-sig", errors="strict" if len(data) <= _MAX_BYTES else "replace")
    matter = _FRONT_MATTER.match(text)
    if matter is None:
        raise ValueError("its front matter does not end, or is larger than 256 KiB")
    try:
        _check_plain(yaml.parse(matter[1]))
        # All scalars are strings, such as the language `no`, and nothing is constructed by a tag.
        value = yaml.load(matter[1], yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"its front matter is no YAML ({one_line(error)})") from None
    return value if isinstance(value, dict) else {}


def _check_plain(events: Iterable[Any]) -> None:
    """Refuse YAML bombs: aliases and deep nesting."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError("its front matter has YAML aliases, or is nested too deep")
