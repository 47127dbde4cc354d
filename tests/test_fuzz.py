"""Commands on mutated files: exit code 0 or 2, one printable line, no hang, the source as it was.

Each target has its share of HFPRUNE_FUZZ_SECONDS (30 by default; `make fuzz` takes 300). A failure
names its seed: `HFPRUNE_FUZZ_SEED=n` begins with it.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random

import pytest
from checkpoints import random_llama, snapshot
from forked import hfprune_process, processor_seconds
from interruption import interrupt
from mutation import Mutate, mutate_bytes, mutate_json, mutate_safetensors

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.pretrained import load_tokenizer

SECONDS = float(os.environ.get("HFPRUNE_FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("HFPRUNE_FUZZ_SEED", "0"))
CPU_SECONDS, WALL_SECONDS = 10, 90

SCORE = ["score", "model", "--samples", "4", "--seq-len", "16", "--batch-size", "1"]
SCORE += ["--out", "new", "--calibration"]
PRUNE = ["prune", "model", "--prune-ratio", "0.3", "--out"]
DATA_FREE = [*PRUNE, "new", "--criterion", "magnitude"]
TARGETS: dict[str, tuple[str, Mutate, list[list[str]]]] = {
    "config": (
        "model/config.json", mutate_json,
        [["plan", "model", "--prune-ratio", "0.2"], DATA_FREE, [*SCORE, "text.txt"]],
    ),
    "index": ("model/model.safetensors.index.json", mutate_json, [DATA_FREE]),
    "weights": ("model/model-00001-of-00003.safetensors", mutate_safetensors, [DATA_FREE]),
    "tokenizer": ("model/tokenizer.json", mutate_json, [[*SCORE, "text.txt"]]),
    "tokenizer config": ("model/tokenizer_config.json", mutate_json, [[*SCORE, "text.txt"]]),
    "scores": ("scores", mutate_safetensors, [[*PRUNE, "new", "--scores", "scores"]]),
    "state": ("new.state", mutate_safetensors, [[*SCORE, "text.txt", "--resume"]]),
    "record": (
        "old/hfprune.json", mutate_json,
        [[*PRUNE, "old", "--scores", "scores", "--force"],
         ["evaluate", "model", "old", "--text", "text.txt", "--seq-len", "16", "--samples", "2"]],
    ),
    "text": ("text.txt", mutate_bytes, [[*SCORE, "text.txt"]]),
    "json lines": ("text.jsonl", mutate_json, [[*SCORE, "text.jsonl"]]),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two shards, texts, scores, a state of an interrupted run and a pruned model."""
    folder = tmp_path_factory.mktemp("fuzz")
    random_llama().save_pretrained(folder / "model", max_shard_size="400KB")
    load_tokenizer(TINY_MODEL).save_pretrained(folder / "model")
    text = (TINY_MODEL / "calibration.txt").read_text(encoding="utf-8")[:4000]
    (folder / "text.txt").write_text(text)
    lines = [json.dumps({"text": line, "id": i}) for i, line in enumerate(text.splitlines())]
    (folder / "text.jsonl").write_text("\n".join(lines))
    table = hf.score(folder / "model", folder / "text.txt", samples=4, seq_len=16)
    table.save(folder / "scores")
    keep = hf.select(table, prune_ratio=0.3, allocation="global")
    hf.prune_checkpoint(folder / "model", folder / "old", keep)
    sizes = {"samples": 4, "seq_len": 16, "batch_size": 1}
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, at_pass=2)
        with pytest.raises(KeyboardInterrupt):
            hf.score(
                folder / "model", folder / "text.txt", state_file=folder / "new.state", **sizes
            )
    return folder


def fault_of(command: list[str], log: Path) -> str | None:
    """Run a command; return what is wrong with how it ended."""
    with hfprune_process(*command, log=log, prepare=processor_seconds(CPU_SECONDS)) as process:
        process.join(WALL_SECONDS)
        code = process.exitcode
    printed = log.read_bytes() + log.with_suffix(".out").read_bytes()
    said = printed.decode("utf-8", "backslashreplace")
    if code not in (0, 2):
        return f"exit code {code}"
    if "Traceback" in said:
        return "a traceback"
    if any(not char.isprintable() and char not in "\n\r" for char in said):
        return "a control character"
    if code == 2 and said.count("hfprune: error: ") != 1:
        return "not one line of error"
    return None


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_end_in_success_or_one_line(
    target: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    measured: Callable[[str], None],
) -> None:  # fmt: skip
    name, mutate, commands = TARGETS[target]
    end, tried = time.monotonic() + SECONDS / len(TARGETS), 0
    for seed in count(SEED):
        if tried and time.monotonic() > end:
            break
        work = tmp_path / str(seed)
        shutil.copytree(files, work)
        monkeypatch.chdir(work)
        random = Random(seed)
        original = Path(name).read_bytes()
        mutated = mutate(original, random)
        Path(name).write_bytes(mutated)
        before = snapshot(Path("model"))
        for number, command in enumerate(commands):
            fault = fault_of(command, Path(f"log{number}"))
            if fault is None and snapshot(Path("model")) != before:
                fault = "the source was written to"
            said = Path(f"log{number}").read_text(errors="backslashreplace")[-2000:]
            assert fault is None, f"seed {seed}: {fault} of {' '.join(command)}\n{said}"
            tried += 1
        shutil.rmtree(work)
    measured(f"{tried} commands on mutations of a {target}, from seed {SEED}: no fault")
