"""Records of data sets as documents: their text, or their chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_fast.errors import CalibrationError

FIELDS = ("text", "messages", "conversations")  # the first that a record has is read
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_SHOWN_FIELDS = 12


@dataclass(frozen=True)
class Document:
    """A text, or a chat and what it is as plain text: `role: content`, blank lines between."""

    text: str
    chat: list[dict[str, str]] | None = None  # [{"role": ..., "content": ...}]


def document_of(record: Any, where: str, fields: Sequence[str] = FIELDS) -> Document | None:
    """Return what a record holds; None where that is null or blank.

    Args:
        record: a string, or an object with one of the fields.
        where: the record's file and line, for messages.
        fields: names of the field to read, in order of preference.

    Raises:
        CalibrationError: none of the fields is there, or holds neither text nor a chat.
    """
    value = record
    if isinstance(record, dict):
        if not any(name in record for name in fields):
            raise CalibrationError(
                f"{where} has no field {_listed(fields, 'or')}; its fields are "
                f"{_listed(list(record), 'and')}: give one as --text-field NAME"
            )
        value = next((record[name] for name in fields if record.get(name) is not None), None)
    if value is None:
        return None
    chat = _chat(value, where) if isinstance(value, list) and value is not record else None
    text = value
    if chat is not None:
        spoken = [message for message in chat if message["content"].strip()]
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in spoken)
    if not isinstance(text, str):
        raise CalibrationError(
            f"{where} has a value of type {type(value).__name__}, expected text or a chat "
            f"(in field {_listed(fields, 'or')})"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CalibrationError(
            f"{where} has half a surrogate pair in its text; it is not Unicode text"
        ) from None
    return Document(text, chat) if text.strip() else None


def _chat(messages: list[Any], where: str) -> list[dict[str, str]]:
    """Return messages in OpenAI's form from that (role, content) or ShareGPT's (from, value)."""
    chat = []
    for message in messages:
        said = message if isinstance(message, dict) else {}
        role = said.get("role") or said.get("from")
        content = said.get("content") or said.get("value") or ""  # null where a tool is called
        if isinstance(content, list):  # parts; images and the like have no text
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "\n".join(part for part in parts if isinstance(part, str))
        if not isinstance(role, str) or not isinstance(content, str):
            raise CalibrationError(
                f"{where} has a list that is no chat; expected messages of role and content, "
                "or of from and value"
            )
        chat.append({"role": _ROLES.get(role, role), "content": content})
    return chat


def _listed(names: Sequence[Any], word: str) -> str:
    shown = [ascii(str(name)[:40]).replace("'", '"') for name in names[:_SHOWN_FIELDS]]
    if len(names) > _SHOWN_FIELDS:
        shown.append(f"{len(names) - _SHOWN_FIELDS} more")
    if not shown:
        return "none"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"
