"""Nothing that a run reads is written to, and nothing that is not ours is replaced or deleted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hfprune_fast as hf
from hfprune_fast.checkpoint import atomic
from hfprune_fast.checkpoint.writer import Writing
from hfprune_fast.errors import OutputError

Hfprune = Callable[..., Any]
KEEP = {layer: torch.arange(0, 96, 2) for layer in range(3)}


def refused(run: Any, message: str) -> None:
    assert run.code == 2, run.err
    assert message in run.err.splitlines()[-1]


@pytest.fixture
def snapshot(llama_dir: Path, tmp_path: Path) -> Path:
    """The model as a hub's cache has it: links into a folder of blobs."""
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    folder = cache / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(llama_dir.iterdir())):
        path.rename(cache / "blobs" / str(number))
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    llama_dir.rmdir()
    return folder


def test_outputs_are_compared_with_the_files_behind_links(
    snapshot: Path, tmp_path: Path, text_file: Path, hfprune: Hfprune
) -> None:
    corpus, blobs = tmp_path / "corpus", snapshot.parents[1] / "blobs"
    corpus.mkdir()
    (corpus / "a.txt").symlink_to(text_file)
    shutil.copy(text_file, tmp_path / "text.state")
    (corpus / "b.txt").symlink_to(tmp_path / "text.state")
    os.link(text_file, tmp_path / "another_name")
    weights = (snapshot / "model.safetensors").resolve()
    before = {path: path.read_bytes() for path in [*blobs.iterdir(), text_file]}
    score = ["score", snapshot, "--calibration", corpus, "--force", "--samples", 2, "--out"]
    for out in (weights, text_file, tmp_path / "another_name", snapshot / "new", corpus / "new"):
        refused(hfprune(*score, out), "which is never written to")
    (tmp_path / "to_blob").symlink_to(weights)
    refused(hfprune(*score, tmp_path / "to_blob"), "which is never written to")
    refused(hfprune(*score, tmp_path / "text"), "which is never written to")  # its state is text
    prune = ["prune", snapshot, "--calibration", corpus, "--prune-ratio", 0.2, "--force", "--out"]
    for folder in (blobs, tmp_path / "text", snapshot.parent, snapshot / "new"):
        refused(hfprune(*prune, folder), "which is never written to")
    assert {path: path.read_bytes() for path in before} == before


def test_force_replaces_no_file_but_scores(
    llama_dir: Path, tmp_path: Path, text_file: Path, hfprune: Hfprune
) -> None:
    score = ["score", llama_dir, "--calibration", text_file, "--samples", 2, "--seq-len", 32]
    out = tmp_path / "out"
    out.write_text("three weeks of work")
    refused(hfprune(*score, "--out", out, "--force"), "is not an hfprune scores file")
    assert out.read_text() == "three weeks of work"
    out.unlink()
    assert hfprune(*score, "--out", out).code == 0
    refused(hfprune(*score, "--out", out), "exists; --force")
    (tmp_path / "link").symlink_to(out)
    assert hfprune(*score, "--out", tmp_path / "link", "--force").code == 0
    assert (tmp_path / "link").is_symlink()
    itself = tmp_path / "itself"
    itself.symlink_to("itself")
    refused(hfprune(*score, "--out", itself, "--force"), "is not an hfprune scores file")


@pytest.mark.parametrize("out", [".", "", "..", "/", "new/..", "x" * 300])
def test_outputs_that_name_nothing(
    llama_dir: Path, hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(llama_dir.parent)
    for command in (
        ["score", llama_dir, "--calibration", "demo", "--samples", 2, "--seq-len", 32],
        ["prune", llama_dir, "--criterion", "magnitude", "--prune-ratio", 0.2],
    ):
        run = hfprune(*command, "--force", "--out", out)
        assert run.code == 2, run.err
        assert "hfprune: error: " in run.err.splitlines()[-1]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_comes_to_be_where_the_scores_go_stays(
    llama_dir: Path, tmp_path: Path, text_file: Path, hfprune: Hfprune,
    monkeypatch: pytest.MonkeyPatch, force: list[str],
) -> None:  # fmt: skip
    out, save = tmp_path / "out", hf.ImportanceTable.save

    def while_the_user_writes(self: hf.ImportanceTable, *args: Any) -> None:
        out.write_text("mine")
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(hf.ImportanceTable, "save", while_the_user_writes)
        run = hfprune(
            "score", llama_dir, "--calibration", text_file, "--samples", 2, "--seq-len", 32,
            "--out", out, *force,
        )  # fmt: skip
    refused(run, "something else is there, which stays")
    assert out.read_text() == "mine"
    (rescued,) = tmp_path.glob("hfprune-scores-*")
    assert f"the scores are saved in {rescued}" in run.err
    assert hf.ImportanceTable.load(rescued).l1.shape == (3, 96)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_comes_into_the_output_meanwhile_stays(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    out, write = tmp_path / "out", Writing.write
    hf.prune_checkpoint(llama_dir, out, KEEP)
    old = {path.name: path.read_bytes() for path in out.iterdir()}

    def while_the_user_writes(self: Writing, partial: Path, progress: bool) -> None:
        (out / "notes.md").write_text("mine")
        write(self, partial, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Writing, "write", while_the_user_writes)
        with pytest.raises(OutputError, match=r"notes\.md is in it now.*new output is whole, in"):
            hf.prune_checkpoint(llama_dir, out, KEEP, force=True, max_shard_size="50KB")
    assert (out / "notes.md").read_text() == "mine"
    assert {name: (out / name).read_bytes() for name in old} == old
    names = sorted(path.name for path in tmp_path.iterdir())
    (new,) = tmp_path.glob("out.new-*")
    assert names == ["model", "out", new.name]
    assert hf.prune_checkpoint(new, tmp_path / "again", {i: torch.arange(9) for i in range(3)})
    (out / "notes.md").unlink()
    hf.prune_checkpoint(llama_dir, out, KEEP, force=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", ["a file", "a link", "nothing"])
def test_another_thing_in_the_place_of_the_output_stays(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, kind: str
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    out, other, write = tmp_path / "out", tmp_path / "other", Writing.write
    for folder in (out, other):
        hf.prune_checkpoint(llama_dir, folder, KEEP)

    def while_the_user_moves(self: Writing, partial: Path, progress: bool) -> None:
        out.rename(tmp_path / "moved")
        if kind == "a file":
            out.write_text("mine")
        elif kind == "a link":
            out.symlink_to(other)
        write(self, partial, progress)

    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Writing, "write", while_the_user_moves)
        if kind == "nothing":
            hf.prune_checkpoint(llama_dir, out, KEEP, force=True)
            assert (out / "config.json").exists()
        else:
            with pytest.raises(OutputError, match="the new output is whole, in"):
                hf.prune_checkpoint(llama_dir, out, KEEP, force=True)
            assert out.is_symlink() or out.read_text() == "mine"
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert (tmp_path / "moved" / "config.json").exists()


def test_the_earlier_output_is_never_missing(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system exchanges names, there is always an output under its name."""
    out, rename, seen = tmp_path / "out", Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        seen.append((self.name, Path(target).name))
        return rename(self, target)

    hf.prune_checkpoint(llama_dir, out, KEEP)
    if not atomic._exchange(llama_dir, out):
        pytest.skip("no exchange of names here")
    atomic._exchange(llama_dir, out)
    monkeypatch.setattr(Path, "rename", watched)
    hf.prune_checkpoint(llama_dir, out, KEEP, force=True)
    assert seen == []


HOSTILE_NAMES = (
    "../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "", ".",
    "a\\b.safetensors", "config.json", "hfprune.json", "README.md", "a\0.safetensors",
    "\ud800.safetensors", ".hidden.safetensors", "x" * 300 + ".safetensors", "\x1b[2J.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_in_an_index_are_no_paths(
    llama_dir: Path, tmp_path: Path, hfprune: Hfprune, name: str
) -> None:
    (llama_dir / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    run = hfprune(
        "prune",
        llama_dir,
        "--criterion",
        "magnitude",
        "--prune-ratio",
        0.2,
        "--out",
        tmp_path / "o",
    )
    refused(run, "names a file outside its folder")
    assert run.err.strip().isprintable()


@pytest.mark.parametrize("files", [["../model/config.json", "/etc/passwd", "notes.md/"], [[1], {}]])
def test_names_in_a_record_are_no_paths(llama_dir: Path, tmp_path: Path, files: list[Any]) -> None:
    out = tmp_path / "out"
    hf.prune_checkpoint(llama_dir, out, KEEP)
    (out / "notes.md").write_text("mine")
    record = json.loads((out / "hfprune.json").read_text())
    (out / "hfprune.json").write_text(json.dumps({**record, "files": record["files"] + files}))
    with pytest.raises(OutputError, match="which hfprune did not write"):
        hf.prune_checkpoint(llama_dir, out, KEEP, force=True)
    assert (llama_dir / "config.json").exists()
    assert (out / "notes.md").read_text() == "mine"
