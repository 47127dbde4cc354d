"""Pieces of HTML; untrusted text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hfprune_fast.errors import MAX_CHARS, printable


def name(text: str) -> str:
    """Return a name that someone else chose as HTML that shows it and does nothing."""
    return escape(printable(text)[:MAX_CHARS])


def code(text: str) -> str:
    """Return text with parts in backticks as HTML."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def section(title: str, text: str, picture: str = "", more: str = "") -> str:
    """Return a section of a page; a picture stands beside its text where there is room."""
    figure = f"<figure>{picture}</figure>" if picture else ""
    kind = ' class="pictured"' if picture else ""
    return f"<section{kind}>\n<div><h2>{title}</h2>\n{text}</div>\n{figure}{more}\n</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table of cells of HTML, that scrolls in its own box where it is too wide."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    tbody = "<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return f'<div class="scroll"><table class="{kind}">{thead}{tbody}</table></div>'
