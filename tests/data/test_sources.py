import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import OPENAI, PARTS, PLAIN, SHAREGPT

from hfprune_fast.data import json_values, sources
from hfprune_fast.data.sources import documents_of
from hfprune_fast.errors import CalibrationError

TEXTS = [f'text {i}: é\u2028 \U0001f600 "quoted" \\ [1, 2] {{}} \n' * (i + 1) for i in range(7)]
RECORDS = [{"id": i, "text": text, "more": None} for i, text in enumerate(TEXTS)]


def texts(source: Path | str, field: str | None = None, **options: bool) -> list[str]:
    return [document.text for document in documents_of(source, field, **options)]


def lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def saved(folder: Path, records: list[Any]) -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.Dataset.from_list(records).save_to_disk(folder)


def parquet(path: Path, records: list[Any]) -> None:
    tables = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(tables.Table.from_pylist(records), path)


FORMATS: dict[str, Callable[[Path, list[Any]], Any]] = {
    "lines.jsonl": lambda path, records: path.write_bytes(lines(records)),
    "lines.json": lambda path, records: path.write_bytes(lines(records)),
    "bom.json": lambda path, records: path.write_bytes(b"\xef\xbb\xbf" + lines(records)),
    "array.json": lambda path, records: path.write_text(json.dumps(records)),
    "array.jsonl": lambda path, records: path.write_text(json.dumps(records)),
    "indented.json": lambda path, records: path.write_text(json.dumps(records, indent=2)),
    "unescaped.json": lambda path, records: path.write_text(
        json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8"
    ),
    "c4.00000-of-01024.json.gz": lambda path, records: path.write_bytes(
        gzip.compress(lines(records))
    ),
    "LINES.JSONL.GZ": lambda path, records: path.write_bytes(gzip.compress(lines(records))),
    "rows.parquet": parquet,
    "saved": saved,
}


@pytest.fixture(autouse=True)
def _read_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of JSON are cut anywhere between two reads."""
    monkeypatch.setattr(json_values, "_CHUNK_CHARS", 300)
    monkeypatch.setattr(sources, "_DOCUMENT_CHARS", 300)


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_the_same_in_every_format(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name, RECORDS)
    assert "".join(texts(tmp_path / name)) == "".join(TEXTS)
    renamed = [{"body": record["text"], "text": None} for record in RECORDS]
    FORMATS[name](tmp_path / f"other-{name}", renamed)
    assert "".join(texts(tmp_path / f"other-{name}", "body")) == "".join(TEXTS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chat", [{"messages": OPENAI}, {"conversations": SHAREGPT}])
def test_chats_are_read_plainly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, chat: dict[str, Any]
) -> None:
    FORMATS[name](tmp_path / name, [chat] * 2)
    assert texts(tmp_path / name) == [PLAIN] * 2
    assert (
        "2 chats are read as plain text, `role: content`; --chat-template" in capfd.readouterr().err
    )


def test_parts_of_a_message_and_messages_without_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_bytes(lines([{"dialogue": PARTS}, ["a list", "of texts"], "a text"]))
    assert texts(path, "dialogue") == [PLAIN, "a list", "of texts", "a text"]


def test_chunks_of_any_size_give_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    record = {"n": [1.5e-300, -12, True, None], "text": 'a\\"\u20ac\U0001f600', "o": {"x": "y"}}
    path.write_text(json.dumps(record) + ",\n" + json.dumps([record, record], indent=1))
    for size in range(8, 130):
        monkeypatch.setattr(json_values, "_CHUNK_CHARS", size)
        assert texts(path) == [record["text"]] * 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plain words [1] {2}\n" * 40, "plain words [1] {2}\n" * 40),
        ("[Scene 1] words", "[Scene 1] words"),
        (' {"text": "of a record"}\n', "of a record"),
        ('[\n {"text": "of an item"}]', "of an item"),
        ("", ""),
    ],
)
def test_stdin(monkeypatch: pytest.MonkeyPatch, given: str, expected: str) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(given.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert "".join(texts("-")) == expected
    assert not stdin.buffer.closed


def test_stdin_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for stdin in (io.TextIOWrapper(io.BytesIO(b"\xff\xfe")), io.StringIO("words"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(CalibrationError, match="stdin"):
            texts("-")


def test_what_is_left_out_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "part.jsonl").write_bytes(
        lines([{"text": None}, {"text": "words"}, {"text": " \n"}, None, {"messages": []}])
    )
    (tmp_path / "._part.jsonl").write_bytes(b"\x00\x05\x16\x07Mac OS X \xff\xfe")
    (tmp_path / "dataset_info.json").write_text('{"description": "words"}')
    assert texts(tmp_path) == ["words"]
    (said,) = capfd.readouterr().err.splitlines()
    assert "4 empty or null entries" in said
    assert "1 ._ files (._part.jsonl)" in said
    assert "1 .json files beside texts in other formats (dataset_info.json)" in said


@pytest.mark.parametrize(
    "name",
    [
        "test.txt", "wiki.valid.txt", "data/validation-00000-of-00001.txt", "my_test.txt",
        "test/a.txt", "Dev.txt", "eval2.txt", "x-val.txt.gz", "heldout.txt",
    ],
)  # fmt: skip
def test_held_out_files_are_left_out_of_a_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "test"  # a folder's own name says nothing
    for file, text in ((name, "held out"), ("train.txt", "train"), ("latest-values.txt", "values")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        opened = gzip.open if file.endswith(".gz") else open
        with opened(folder / file, "wt") as out:
            out.write(text)
    assert texts(folder) == ["values", "train"]
    said = capfd.readouterr().err
    assert f"1 files or splits for evaluation by name ({name})" in said
    assert texts(folder / name) == ["held out"]
    assert sorted(texts(folder, evaluation=True)) == ["held out", "train", "values"]
    for file in ("train.txt", "latest-values.txt"):
        (folder / file).unlink()
    assert texts(folder) == ["held out"]
    assert capfd.readouterr().err == ""


def test_held_out_splits_are_left_out_of_a_saved_data_set(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    capfd.readouterr()
    assert texts(tmp_path / "saved") == ["train"]
    assert "1 files or splits for evaluation by name (test)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "answer": "b"}, 'no field "text", "messages" or "conversations"; its '
         'fields are "prompt" and "answer": give one as --text-field NAME'),
        ({}, "its fields are none"),
        ({f"f{i}": 0 for i in range(99)}, '"f11" and 87 more'),
        ({"\x1b[31m\n": 1}, r'its fields are "\\x1b\[31m\\n"'),
        ({"text": 5}, "value of type int, expected text or a chat"),
        (5, "value of type int, expected text or a chat"),
        ({"messages": ["a"]}, "a list that is no chat; expected messages of role and content"),
        ({"messages": [{"role": 1, "content": "a"}]}, "a list that is no chat"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "a list that is no chat"),
        ({"text": "\ud800"}, "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
    ],
)  # fmt: skip
def test_records_without_text(tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": "words"}]) + lines([record]))
    with pytest.raises(CalibrationError, match=message) as raised:
        texts(path)
    assert f"{path}:2 has" in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["rows.parquet", "saved"])
def test_tables_without_text(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name, [{"prompt": "a", "answer": "b"}])
    with pytest.raises(CalibrationError, match='its fields are "prompt" and "answer"'):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_damaged_saved_data_set(tmp_path: Path, name: str) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    for file in (name, "dataset_info.json"):
        (tmp_path / file).write_text('{"splits": ["../.."]}')
    with pytest.raises(CalibrationError, match="is not a saved data set") as raised:
        texts(tmp_path)
    assert "\n" not in str(raised.value)


def test_saved_data_sets_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'hfprune_fast\[datasets\]'"):
        texts(tmp_path)


def test_names_that_are_not_utf8(
    tmp_path: Path, text_file: Path, hfprune: Callable[..., Any]
) -> None:
    folder = tmp_path / os.fsdecode(b"fold\xe9r\x1b[31m")
    folder.mkdir()
    for name in (b"\xff.txt", b"\xfe_test.txt"):
        (folder / os.fsdecode(name)).write_bytes(text_file.read_bytes())
    flags = ["--preset", "paper", "--prune-ratio", 0.1, "--samples", 2, "--seq-len", 32]
    for source in (folder, folder / os.fsdecode(b"\xff.txt")):
        run = hfprune("prune", "demo", "--calibration", source, "--out", tmp_path / "out", *flags)
        assert run.code == 0, run.err
        record = json.loads((tmp_path / "out" / "hfprune.json").read_text(encoding="utf-8"))
        assert record["provenance"]["calibration"]["source"].isprintable()
        flags.append("--force")
