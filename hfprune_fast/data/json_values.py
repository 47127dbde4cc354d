"""JSON values of a file of any size, a part of it in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from hfprune_fast.errors import CalibrationError, one_line

_CHUNK_CHARS = 1 << 20
_MAX_CHARS = 1 << 26  # of one value; what is longer is no record
_BETWEEN = re.compile(r"[ \t\r\n,\[\]]*")


def json_values(file: TextIO, name: str, text: str = "") -> Iterator[tuple[str, Any]]:
    """Yield JSON values one after another, on lines of their own or not, or items of an array."""
    decoder, at, line = json.JSONDecoder(), 0, 1
    while True:
        between = _BETWEEN.match(text, at)
        start = between.end() if between else at
        line += text.count("\n", at, start)
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            is_whole = not _may_go_on(error, text)
            more = "" if is_whole else file.read(max(_CHUNK_CHARS, len(text) - start))
            if not more and start == len(text):
                return
            if not more or len(text) - start > _MAX_CHARS:
                what = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
                raise CalibrationError(f"{name}:{line} is not JSON: {what}") from None
            text, at = text[start:] + more, 0
            continue
        yield f"{name}:{line}", value
        line += text.count("\n", start, at)


def _may_go_on(error: Exception, text: str) -> bool:
    """Whether JSON may be wrong only in that its end has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    longest_token = 16  # of those that may be cut: numbers go on where they are cut
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - longest_token
