"""A source's README.md gives a licence and languages, or one line, whatever it holds."""

import itertools
import time
from pathlib import Path

import pytest

from hfprune_fast.checkpoint.source_card import source_card

GOOD = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags: [x]\n---\n# Title\n"
FACTS = {"license": "apache-2.0", "language": ["en", "de"]}
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefgh")
)
MERGES = "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}\n"


def front(matter: str) -> bytes:
    return f"---\n{matter}---\n".encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    ("card", "facts"),
    [
        (GOOD.encode(), FACTS),
        (b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(), FACTS),
        (GOOD.encode() + b"x" * 400_000, FACTS),
        (
            front("license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: en\n"),
            {
                "license": "other",
                "license_name": "own",
                "license_link": "LICENSE",
                "language": ["en"],
            },
        ),
        (b"# no front matter\n", {}),
        (b"", {}),
        (b"\xff\xfe no text at all", {}),
        (front(""), {}),
        (front("[1, 2]\n"), {}),
        (front("license: [mit]\nlanguage: {en: 1}\n"), {}),
        (front("license:\nlanguage: [no, on, [sv]]\n"), {"language": ["no", "on"]}),
        (front("x: !!python/object/apply:os.system [touch owned]\n"), {}),
        (front("x: " + "9" * 10_000 + "\n"), {}),
        (front('license: "mit\\nbase_model: x"\nlicense_link: "javascript:alert(1) x"\n'), {}),
        (front(f"license: {'x' * 200}\n"), {}),
    ],
)  # fmt: skip
def test_what_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], card: bytes, facts: object
) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert source_card(tmp_path) == facts
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (front(BOMB), "aliases"),
        (front(MERGES), "aliases"),
        (front("a: " + "[" * 100_000 + "\n"), "nested too deep"),
        (front("a: " * 5000 + "\n"), "no YAML"),
        (front("x: \x00\n"), "no YAML"),
        (front("x: \ud800\n"), "codec can't decode"),
        (b"---\nlicense: m\xff\n---\n", "codec can't decode"),
        (front("x: {a: b\n"), "no YAML"),
        (b"---\nlicense: mit\n", "does not end"),
        (b"---\n" + b"# comment\n" * 50_000 + b"---\n", "larger than 256 KiB"),
    ],
)  # fmt: skip
def test_what_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], card: bytes, reason: str
) -> None:
    (tmp_path / "README.md").write_bytes(card)
    begun = time.monotonic()
    assert source_card(tmp_path) == {}
    assert time.monotonic() - begun < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert line.startswith("hfprune: ")
    assert line.isprintable()


def test_no_card(tmp_path: Path) -> None:
    assert source_card(tmp_path) == {}
    (tmp_path / "README.md").mkdir()
    assert source_card(tmp_path) == {}
