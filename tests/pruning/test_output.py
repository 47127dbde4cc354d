"""Where a pruned checkpoint may be written, and that an output is there whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_llama, snapshot, some_keep

import hfprune_fast as hf
from hfprune_fast.checkpoint import atomic, loading
from hfprune_fast.errors import OutputError
from hfprune_fast.pruning import on_disk


def test_output_that_exists(llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hf.prune_checkpoint(llama_dir, out, some_keep())  # an empty folder is no loss
    old = snapshot(out)
    with pytest.raises(OutputError, match="--force"):
        hf.prune_checkpoint(llama_dir, out, some_keep(width=20))
    assert snapshot(out) == old
    hf.prune_checkpoint(llama_dir, out, some_keep(width=20), force=True)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 20


def test_force_replaces_only_what_pruning_wrote(
    llama_dir: Path, save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    (llama_dir / "LICENSE").write_text("theirs")
    (llama_dir / "original").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds thesis.tex, which hfprune did not write"):
        hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    hf.prune_checkpoint(llama_dir, out, some_keep())
    others = save_checkpoint(random_llama(), "another", max_shard_size="100KB")
    hf.prune_checkpoint(others, out, some_keep(), force=True)  # another source's files are ours too
    for name in ("adapter_model.safetensors", "original/mine", ".git/HEAD", "pytorch_model.bin"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(OutputError, match=f"holds {name}, which hfprune did not write"):
            hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "link").symlink_to("nowhere")
    with pytest.raises(OutputError, match="holds link"):
        hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)
    (out / "link").unlink()
    for record in ("[]", "{}", '{"files": 3}'):  # now it may be anybody's model
        (out / "hfprune.json").write_text(record)
        with pytest.raises(OutputError, match="which hfprune did not write"):
            hf.prune_checkpoint(llama_dir, out, some_keep(), force=True)


def test_what_a_killed_run_left_is_said_and_not_touched(llama_dir: Path, tmp_path: Path) -> None:
    for kind in ("partial", "replaced"):
        (tmp_path / f".out.{kind}-1").mkdir()
    (tmp_path / "link").symlink_to("out")
    said = atomic.leftovers(tmp_path / "link")
    assert ["can be deleted" in line for line in said] == [True, False]
    assert "rename it back" in said[1]
    hf.prune_checkpoint(llama_dir, tmp_path / "out", some_keep())
    assert (tmp_path / ".out.partial-1").is_dir()
    assert (tmp_path / ".out.replaced-1").is_dir()


def test_two_runs_to_one_output(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", shutil.copyfile

    def another_run_ends_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(shutil, "copyfile", real)
        out.mkdir()
        (out / "config.json").write_text("the other's")
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", another_run_ends_first)
    with pytest.raises(OutputError, match=r"cannot write .* new output is whole, in .*out\.new"):
        hf.prune_checkpoint(llama_dir, out, some_keep())
    assert (out / "config.json").read_text() == "the other's"
    *others, new = sorted(p.name for p in tmp_path.iterdir())
    assert (others, new[:8]) == (["model", "out"], "out.new-")
    assert loading.load_model(tmp_path / new).config.intermediate_size == 61


def test_output_by_roundabout_paths(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "to_real").symlink_to(real)
    hf.prune_checkpoint(llama_dir, tmp_path / "to_real", some_keep())
    assert (tmp_path / "to_real").is_symlink()
    assert (real / "config.json").exists()
    hf.prune_checkpoint(llama_dir, real / ".." / "real", some_keep(width=9), force=True)
    assert json.loads((real / "config.json").read_text())["intermediate_size"] == 9
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for out in (".", "", "../empty"):
        with pytest.raises(OutputError, match="current folder"):
            hf.prune_checkpoint(llama_dir, out, some_keep())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "real", "to_real"]


@pytest.mark.parametrize("place", [".", "..", "inside", "inside/deeper", "../model", "../link"])
@pytest.mark.parametrize("force", [False, True])
def test_output_that_overlaps_the_source(llama_dir: Path, place: str, force: bool) -> None:
    (llama_dir.parent / "link").symlink_to(llama_dir)
    before = snapshot(llama_dir)
    with pytest.raises(OutputError, match="which is never written to"):
        hf.prune_checkpoint(llama_dir, llama_dir / place, some_keep(), force=force)
    assert snapshot(llama_dir) == before


def test_output_that_is_a_file_or_below_one(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out"):
        with pytest.raises(OutputError, match="is a file"):
            hf.prune_checkpoint(llama_dir, tmp_path / out, some_keep())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="no permission to write"):
        hf.prune_checkpoint(llama_dir, tmp_path / "locked" / "out", some_keep())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc, which not even root may write")
def test_output_that_root_cannot_write(llama_dir: Path) -> None:
    with pytest.raises(OutputError, match=r"/proc/out: cannot|out /proc/out cannot|cannot write"):
        hf.prune_checkpoint(llama_dir, Path("/proc/out"), some_keep())


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """Every write beyond that fails in the kernel, as on a full disk."""
    resource = pytest.importorskip("resource", reason="no resource limits on this system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_nothing(llama_dir: Path, tmp_path: Path) -> None:
    with (
        files_no_larger_than(50_000),
        pytest.raises(OutputError, match=r"cannot write .*out: .*(too large|space)"),
    ):
        hf.prune_checkpoint(llama_dir, tmp_path / "out", some_keep())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_too_little_room_is_seen_before_any_work(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"takes 1024\.0 TiB, but only .* are free"):
        on_disk.check_output_folder(tmp_path / "out", llama_dir, force=False, needed_bytes=1 << 50)


def test_failure_keeps_the_folder_that_force_would_replace(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    hf.prune_checkpoint(llama_dir, out, some_keep())
    old = snapshot(out)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf.prune_checkpoint(llama_dir, out, some_keep(width=20), force=True)
    assert snapshot(out) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
