"""Chats rendered by the tokenizer's chat template."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chats import OPENAI, PARTS, SHAREGPT

from hfprune_fast.checkpoint.pretrained import load_tokenizer
from hfprune_fast.config import TINY_MODEL
from hfprune_fast.data.calibration import token_windows
from hfprune_fast.errors import ArgumentError, CalibrationError


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    records = [{"messages": OPENAI}, {"conversations": SHAREGPT}] * 3
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def tokenizer() -> Iterator[Any]:
    return load_tokenizer(TINY_MODEL)


def windows(source: Path, tokenizer: Any, **changes: Any) -> Any:
    sizes = {"seq_len": 8, "samples": None, "vocab_size": 1 << 20}
    return token_windows(source, tokenizer, chat_template=True, **{**sizes, **changes})


def test_chat_template(chats: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    rendered = "<user>Why?<assistant>Because."
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"] * 6  # no BOS or EOS beside
    assert windows(chats, tokenizer).flatten().tolist() == ids[: len(ids) // 8 * 8]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, ArgumentError, "has no chat template; leave out --chat-template"),
        (
            "{{ raise_exception('roles must\nalternate') }}",
            CalibrationError,
            "roles must alternate",
        ),
        ("{% for", CalibrationError, "cannot render a chat"),
        ("{{ ''.__class__.__mro__ }}", CalibrationError, "cannot render a chat"),  # in a sandbox
    ],
)
def test_chat_templates_that_do_not_work(
    chats: Path, tokenizer: Any, template: str | None, error: type[Exception], message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(error, match=message) as raised:
        windows(chats, tokenizer)
    assert "\n" not in str(raised.value)


def test_a_chat_template_without_chats_is_said(
    tmp_path: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer.chat_template = "{{ messages }}"
    (tmp_path / "a.txt").write_text("words " * 40)
    windows(tmp_path / "a.txt", tokenizer)
    assert "holds no chats; --chat-template has no effect" in capfd.readouterr().err


def test_chats_in_the_whole_job(
    llama_dir: Path, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    (llama_dir / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")
    (tmp_path / "chats.json").write_text(json.dumps([{"dialogue": PARTS}] * 9, indent=1))
    flags = ["--samples", 2, "--seq-len", 16, "--text-field", "dialogue", "--chat-template"]
    source = ["--calibration", tmp_path / "chats.json"]
    scored = hfprune("score", llama_dir, *source, "--out", tmp_path / "s", *flags)
    assert scored.code == 0, scored.err
    next_command = scored.out.splitlines()[-1]
    assert " --text-field dialogue --chat-template --prune-ratio" in next_command
    pruned = hfprune(*next_command.removeprefix("next: hfprune ").split()[:-1], tmp_path / "out")
    assert pruned.code == 0, pruned.err
    record = json.loads((tmp_path / "out" / "hfprune.json").read_text())
    calibration = record["provenance"]["calibration"]
    assert (calibration["text_field"], calibration["chat_template"]) == ("dialogue", True)
