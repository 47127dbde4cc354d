import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hfprune_fast as hf
from hfprune_fast.errors import OutputError, ScoresFileError
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.scoring.table import saved_on_failure

SIZE = ModelSpec("llama", 2, 8, 5, 1000, 900, 24)


NAMES = ("entropy.l1", "entropy.l2", "entropy.fisher_mask", "act", "down_norm")


def a_table() -> hf.ImportanceTable:
    tensors = torch.rand(5, 2, 5, dtype=torch.float64).unbind()
    provenance = {"seed": 3, "model": "m"}
    return hf.ImportanceTable(dict(zip(NAMES, tensors, strict=True)), SIZE, provenance)


def test_round_trip(tmp_path: Path) -> None:
    table, path = a_table(), tmp_path / "scores.safetensors"
    table.save(path)
    loaded = hf.ImportanceTable.load(path)
    for name in ("l1", "l2", "fisher_mask", "act", "down_norm"):
        assert torch.equal(getattr(loaded, name), getattr(table, name))
    assert loaded.model == SIZE
    assert loaded.provenance == table.provenance
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


def test_layout_is_the_documented_one(tmp_path: Path) -> None:
    a_table().save(tmp_path / "s")
    with safe_open(tmp_path / "s", framework="pt") as tensors:
        assert sorted(tensors.keys()) == sorted(NAMES)
        metadata = tensors.metadata()
    header = json.loads(metadata.pop("hfprune_scores"))
    assert metadata == {}
    assert sorted(header) == ["format_version", "model", "provenance"]
    assert header["format_version"] == 3


def test_not_a_scores_file(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(ScoresFileError, match=r"no scores file .* `hfprune score`"):
        hf.ImportanceTable.load(path)
    path.write_text("hello")
    with pytest.raises(ScoresFileError, match="not a scores file"):
        hf.ImportanceTable.load(path)
    save_file({"l1": torch.zeros(2, 5)}, path)
    with pytest.raises(ScoresFileError, match="holds no scores"):
        hf.ImportanceTable.load(path)
    for version in (2, 9):
        header = json.dumps({"format_version": version})
        save_file({"l1": torch.zeros(2, 5)}, path, {"hfprune_scores": header})
        with pytest.raises(ScoresFileError, match=f"format version {version}; .* score again"):
            hf.ImportanceTable.load(path)
    header = json.dumps({"format_version": "x" * 999})
    save_file({"l1": torch.zeros(2, 5)}, path, {"hfprune_scores": header})
    with pytest.raises(ScoresFileError) as raised:
        hf.ImportanceTable.load(path)
    assert len(str(raised.value)) < 500
    nested = "[" * 10**5
    for header in ("{", "7", nested, '{"format_version": 3}', '{"format_version": 3, "model": []}'):
        save_file({"l1": torch.zeros(2, 5)}, path, {"hfprune_scores": header})
        with pytest.raises(ScoresFileError, match="damaged"):
            hf.ImportanceTable.load(path)


def rewritten(path: Path, change: Callable[[Any, Any], object]) -> None:
    """Change the header and the tensors of a scores file."""
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["hfprune_scores"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, {"hfprune_scores": json.dumps(header)})


HOSTILE: dict[str, Callable[[Any, Any], object]] = {
    "no criteria": lambda h, _: h["provenance"].update(criteria=[]),
    "criteria a word": lambda h, _: h["provenance"].update(criteria="entropy"),
    "criteria of numbers": lambda h, _: h["provenance"].update(criteria=[1]),
    "criteria of lists": lambda h, _: h["provenance"].update(criteria=[[]]),
    "an unknown criterion": lambda h, _: h["provenance"].update(criteria=["entropy", "\x1b[2J"]),
    "a criterion not there": lambda h, _: h["provenance"].update(criteria=["fisher"]),
    "provenance a list": lambda h, _: h.update(provenance=[1]),
    "deep provenance": lambda h, _: h["provenance"].update(x=json.loads("[" * 500 + "]" * 500)),
    "no norms": lambda _, t: t.pop("down_norm"),
    "no statistics": lambda _, t: t.clear(),
    "width a float": lambda h, _: h["model"].update(intermediate_size=5.0),
    "width true": lambda h, _: h["model"].update(intermediate_size=True),
    "ten million layers": lambda h, _: h["model"].update(num_layers=10**7),
    "no layers": lambda h, _: h["model"].update(num_layers=0),
    "params negative": lambda h, _: h["model"].update(total_params=-1),
    "params a word": lambda h, _: h["model"].update(linear_params="x"),
    "type a list": lambda h, _: h["model"].update(model_type=[]),
    "widths too many": lambda h, _: h["model"].update(mlp_widths=[1] * 10_000),
    "widths of words": lambda h, _: h["model"].update(mlp_widths=["a", "b"]),
    "widths a number": lambda h, _: h["model"].update(mlp_widths=5),
    "widths too wide": lambda h, _: h["model"].update(mlp_widths=[5, 6]),
    "nothing of a model": lambda h, _: h["model"].clear(),
    "a field less": lambda h, _: h["model"].pop("vocab_size"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_scores_are_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "s"
    a_table().save(path)
    rewritten(path, HOSTILE[case])
    with pytest.raises(ScoresFileError) as raised:
        hf.ImportanceTable.load(path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("num_layers", {"num_layers": 10**6}),
        ("experts", {"experts": [1 << 16] * 2, "num_experts": 1 << 16}),
    ],
)
def test_no_table_is_made_of_impossible_sizes(
    tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    """A billion layers would take all memory."""
    path = tmp_path / "s"
    a_table().save(path)
    rewritten(path, lambda header, _: header["model"].update(fields))
    with pytest.raises(ScoresFileError, match=f"{name} is "):
        hf.ImportanceTable.load(path)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders that a rescue tries."""
    folders = {name: tmp_path / name for name in ("out", "temporary", "home")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folders["temporary"]))
    monkeypatch.setenv("HOME", str(folders["home"]))
    return folders


@pytest.mark.parametrize("room", ["out", "temporary", "home", "nowhere"])
def test_a_rescue_goes_where_there_is_room_and_says_where(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    room: str,
) -> None:  # fmt: skip
    fsync = os.fsync

    def full(file: int) -> None:
        if room not in places or not os.path.samestat(
            os.stat(places[room]), os.stat(Path(os.readlink(f"/proc/self/fd/{file}")).parent)
        ):
            raise OSError(28, "No space left on device")
        fsync(file)

    table = a_table()
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OutputError, match="the first error"),
        saved_on_failure(table, places["out"] / "scores"),
    ):
        raise OutputError("the first error")
    monkeypatch.setattr(os, "fsync", fsync)
    said = capfd.readouterr().err
    left = [path for folder in places.values() for path in folder.iterdir()]
    if room == "nowhere":
        assert left == []
        assert "the scores are lost" in said
        assert said.count("No space left on device") == 3
    else:
        assert [path.parent for path in left] == [places[room]]
        assert f"the scores are saved in {left[0]}" in said
        assert torch.equal(hf.ImportanceTable.load(left[0]).l1, table.l1)


def test_a_rescue_makes_no_folders(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), saved_on_failure(a_table(), tmp_path / "new" / "scores"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()
    assert len(list(places["temporary"].iterdir())) == 1


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "s"
    a_table().save(path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ScoresFileError, match="damaged"):
            hf.ImportanceTable.load(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_numbers_that_cannot_be_scores(value: float) -> None:
    tensors = {name: torch.zeros(2, 5, dtype=torch.float64) for name in NAMES}
    tensors["entropy.l2"][1, 2] = value
    with pytest.raises(ScoresFileError, match=r"entropy\.l2 holds NaN, inf or negative"):
        hf.ImportanceTable(tensors, SIZE, {})


def test_shape_and_dtype_are_checked() -> None:
    tensors = {name: torch.zeros(2, 5, dtype=torch.float64) for name in NAMES}
    with pytest.raises(ScoresFileError, match=r"act must be \(2, 5\) float64"):
        hf.ImportanceTable({**tensors, "act": tensors["act"].float()}, SIZE, {})


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    a_table().save(tmp_path / "s")
    (tmp_path / "plain").touch()
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unwritable(tmp_path: Path) -> None:
    a_table().save(tmp_path / "new" / "folder" / "s")
    with pytest.raises(OutputError, match="cannot write"):
        a_table().save(tmp_path / "new" / "folder" / "s" / "below a file")
