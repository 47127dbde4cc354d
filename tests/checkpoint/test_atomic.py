"""Output that is whole or absent: killed at any moment, on disks that fill up or are read-only."""

import ast
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from processes import in_another_process

import hfprune_fast as hf
from hfprune_fast.checkpoint import native
from hfprune_fast.errors import OutputError

KEEP = {layer: torch.arange(0, 96, 2) for layer in range(3)}


# Forks, so that what takes long, importing torch, is done once.
KILLED = """
import os, random, shutil, signal, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
import hfprune_fast as hf
source, folder, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
keep = {i: torch.arange(0, 4096, 3) for i in range(4)}
reference, out = folder / "reference", folder / "out"

def state(place):
    return {p.name: p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}

hf.prune_checkpoint(source, reference, keep)
begun = time.monotonic()
hf.prune_checkpoint(source, out, keep)
lasts = time.monotonic() - begun
shutil.rmtree(out)
whole, before, counts = state(reference), state(source), {}
generator = random.Random(0)
for round in range(rounds):
    force = round % 2 == 1
    if force:
        hf.prune_checkpoint(source, out, {i: torch.arange(9) for i in range(4)})
        old = state(out)
    child = os.fork()
    if child == 0:
        hf.prune_checkpoint(source, out, keep, force=force)
        os._exit(0)
    time.sleep(generator.uniform(0, 1.2 * lasts))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not out.exists():
        found = "nothing"
    elif state(out) == whole:
        found = "whole"
    else:
        assert force and state(out) == old, round
        found = "old"
    if found == "nothing" and force:  # between two renames: both are there, under other names
        assert any(state(p) == old for p in folder.glob(".out.replaced-*")), round
    counts[found] = counts.get(found, 0) + 1
    lasts *= 0.7 if found == "whole" else 1.3  # a busy machine is slower, and another time faster
    for path in [out, *folder.glob(".out.*")]:
        shutil.rmtree(path, ignore_errors=True)
assert state(source) == before
print(counts)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment(large: Path, tmp_path: Path, measured: Callable[[str], None]) -> None:
    counts = ast.literal_eval(in_another_process(KILLED, large, tmp_path, 20))
    measured(f"killed 20 times while pruning; under the requested name was: {counts}")
    assert counts.get("nothing", 0) + counts.get("old", 0) >= 5  # killed before the end


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount: {error}")
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("extension", [True, False])
def test_disk_that_fills_up(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: bool
) -> None:
    if not extension:
        monkeypatch.setattr(native, "_C", None)
    keep = {layer: torch.arange(3001) for layer in range(4)}
    with mounted(tmp_path / "small", "size=40m") as small:
        (small / "mine").write_text("mine")
        with pytest.raises(OutputError, match=r"cannot write .*out: .*No space left on device"):
            hf.prune_checkpoint(large, small / "out", keep)
        assert [p.name for p in small.iterdir()] == ["mine"]


def test_read_only_disk(llama_dir: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "fixed", "ro") as fixed:
        with pytest.raises(OutputError, match=r"Read-only file system|no permission"):
            hf.prune_checkpoint(llama_dir, fixed / "out", KEEP)
        assert not list(fixed.iterdir())


def test_read_only_source(llama_dir: Path, tmp_path: Path) -> None:
    for file in llama_dir.iterdir():
        file.chmod(0o444)
    llama_dir.chmod(0o555)
    hf.prune_checkpoint(llama_dir, tmp_path / "out", KEEP, verify=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
    llama_dir.chmod(0o755)
