"""Whatever is typed, set, closed or lacking: one printable line and exit 2, or the work done."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_llama
from safetensors.torch import load_file, save_file

import hfprune_fast as hf
from hfprune_fast import cli
from hfprune_fast.errors import ArgumentError, HFPruneError, is_out_of_memory

Hfprune = Callable[..., Any]
PLAN = ["plan", "demo", "--prune-ratio", "0.2"]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NINES = "9" * 310


def assert_one_line(run: Any, message: str, code: int = 2) -> None:
    assert run.code == code, run.err
    (line,) = run.err.splitlines()
    assert line.startswith("hfprune: error: ")
    assert line.isprintable()
    assert len(line) < 700
    assert re.search(message, line), line
    assert run.out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "-1"], "samples must be at least 1, got -1"),
        (["--samples", "1" + 30 * "0"], "samples must be at most 2147483647, got 1000"),
        (["--samples", NINES], "samples must be at most 2147483647, got 999"),
        (["--samples", 5000 * "9"], "--samples.* is not a valid integer|'--samples': '9"),
        (["--seq-len", 2**63], "seq_len must be at most"),
        (["--batch-size", 2**63], "batch_size must be at most"),
        (["--round-to", 2**63], "round_to must be at most"),
        (["--prune-ratio", "nan"], "prune_ratio must be a number or None, got nan"),
        (["--prune-ratio", "1e400"], r"prune_ratio must be in \[0, 1\), got inf"),
        (["--memory-budget", NINES], "memory_budget must be bytes or like 5GB or 512MiB, got '999"),
        (["--memory-budget", f"{NINES}TiB"], "memory_budget must be bytes"),
        (["--device", "hpu"], "device 'hpu' cannot be used here"),
        (["--device", "xpu"], "device 'xpu' cannot be used here"),
        (["--device", "meta"], "device 'meta' cannot be used here; use cpu or cuda"),
        (["--device", "\x1b[31m\n"], r"device '\\x1b\[31m\\n' cannot be used here"),
        (["\x1b]0;title\x07"], r"unexpected extra argument \(\\x1b\]0;title\\x07\)"),
        (["--no-\udcff\x9b"], r"No such option.*\\udcff\\x9b"),
    ],
)
def test_a_value_of_any_size_or_kind(hfprune: Hfprune, flags: list[Any], message: str) -> None:
    assert_one_line(hfprune(*PLAN, *flags), message)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
@pytest.mark.parametrize("criterion", ["fisher", "random"])
def test_seeds(hfprune: Hfprune, tmp_path: Path, criterion: str, seed: int) -> None:
    run = hfprune(
        "prune", "demo", "--calibration", "demo", "--criterion", criterion, "--seed", seed,
        "--prune-ratio", 0.2, "--out", tmp_path / "out",
    )  # fmt: skip
    assert_one_line(run, f"seed must be at (least 0|most 9223372036854775807), got {seed}")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK is set but WORLD_SIZE is not; unset it for one process"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK must be a number, got ''"),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK must be a number, got 'abc'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a number, got '-1'"),
        ({"RANK": "٣", "WORLD_SIZE": "4"}, "RANK must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "1e3"}, "WORLD_SIZE must be a number"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be a number, got '999"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be in 0..WORLD_SIZE-1, got RANK 2 of WOR"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK must be in 0..WORLD_SIZE-1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK must be a number"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK must be in 0..LOCAL_WORLD"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK must be in 0..LOCAL_WORLD_SIZE-1"),
    ],
)
def test_the_variables_of_torchrun_are_checked_together(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_one_line(hfprune(*PLAN), message)


def test_an_unknown_backend_in_the_environment(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HFPRUNE_BACKEND", "\x1b[2J")
    run = hfprune("score", "demo", "--calibration", "demo", "--out", tmp_path / "s")
    assert_one_line(run, r"HFPRUNE_BACKEND must be one of torch, triton, cpp, got '\\x1b\[2J'")


class PanicException(BaseException):
    """As pyo3 raises where Rust panics."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PanicException("called `unwrap()`\n on \x1b[31m"), 2, r"library gave up .*unwrap.*\\x1b"),
        (OverflowError("int too large"), 2, "a number is too large or too small"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), 2, "text is not UTF-8"),
        (OSError(40, "Too many levels", "/a\x1b"), 2, r"Too many levels: '/a\\x1b'"),
        (HFPruneError("of \x1b]0;\x07\n\u202e"), 2, r"of \\x1b\]0;\\x07\\n\\u202e$"),
        (KeyError("x"), 1, "unexpected KeyError"),
    ],
)
def test_whatever_is_raised(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("hfprune_fast.commands.plan.run", fail)
    assert_one_line(hfprune(*PLAN), message, code)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("unable to mmap 8 bytes from file </x>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
        SystemError("error return without exception set"),
    ],
    ids=lambda error: str(error)[:30],
)
@pytest.mark.parametrize("where", ["engine.layerwise.ResidentModel.begin", "checkpoint.pretrained"])
def test_out_of_memory_anywhere(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    if where == "checkpoint.pretrained":
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", full)
    else:
        monkeypatch.setattr(f"hfprune_fast.{where}", full)
    run = hfprune("evaluate", "demo", "demo", "--text", "demo", "--samples", 2, "--seq-len", 16)
    *bars, last = re.split(r"[\r\n]+", run.err.strip())
    assert run.code == 2
    assert last.startswith("hfprune: error: out of memory; try a smaller --batch-size or --seq-len")
    assert all(bar.startswith("evaluating: ") or not bar for bar in bars)


def test_other_errors_are_no_shortage_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_control_characters_in_a_checkpoint_are_escaped(
    hfprune: Hfprune, llama_dir: Path, tmp_path: Path
) -> None:
    weights = llama_dir / "model.safetensors"
    tensors = load_file(weights)
    tensors["\x1b]0;pwned\x07\x1b[2J"] = tensors["model.norm.weight"].clone()
    save_file(tensors, weights, {"format": "pt"})
    run = hfprune("score", llama_dir, "--calibration", "demo", "--out", tmp_path / "s")
    assert_one_line(run, r"does not know: \\x1b\]0;pwned\\x07\\x1b\[2J$")


def test_escaped_names_go_into_records(hfprune: Hfprune, llama_dir: Path, tmp_path: Path) -> None:
    folder, out = llama_dir.rename(llama_dir.with_name("m\x1b[31m")), tmp_path / "out"
    running = ["--calibration", "demo", "--samples", 2, "--seq-len", 32, "--preset", "paper"]
    run = hfprune("prune", folder, *running, "--prune-ratio", 0.2, "--out", out)
    assert run.code == 0, run.err
    assert json.loads((out / "hfprune.json").read_text())["base_model"] == r"m\x1b[31m"
    assert "\x1b" not in (out / "README.md").read_text()


def test_not_in_the_main_thread(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[Any] = []

    def run() -> None:
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*PLAN, "--json"])
        codes.append(exit_info.value.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0], capfd.readouterr().err


IDS = torch.arange(32)[None]
LOADED = random_llama()
TYPES: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (hf.score, ("demo", IDS), {"samples": "4"}, "samples must be a whole number or None, got '4'"),
    (hf.score, ("demo", IDS), {"obs": "yes"}, "obs must be True or False, got 'yes'"),
    (hf.score, ("demo", IDS), {"progress": 1}, "progress must be True or False, got 1"),
    (hf.score, ("demo", IDS), {"criterion": 5}, "criterion must be text, or several, got .5"),
    (hf.score, ("demo", IDS), {"criterion": ["fisher", 3]}, "criterion must be text, or several"),
    (hf.score, ("demo", IDS), {"state_file": 3}, "state_file must be a path, got 3"),
    (hf.score, ("demo", IDS), {"device": 0}, "device must be text, got 0"),
    (
        hf.score,
        ("demo", IDS),
        {"save_seconds": torch.nan},
        "save_seconds must be a number, got nan",
    ),
    (hf.score, ("demo", IDS), {"save_seconds": -1}, "save_seconds must be at least 0, got -1"),
    (hf.oneshot, (LOADED, "demo", "out"), {"prune_ratio": 0.2}, "folder or hub name, got a Llama"),
    (hf.oneshot, ({}, "demo", "out"), {"prune_ratio": 0.2}, "folder or hub name, got a dict"),
    (hf.oneshot, ("demo", "demo", None), {"prune_ratio": 0.2}, "out must be a path, got None"),
    (hf.oneshot, ("demo", "demo", "out"), {"prune_ratio": "0.2"}, "prune_ratio must be a number"),
    (hf.oneshot, ("demo", "demo", "out"), {"protect": "0,1"}, "protect must be layers such as 0,1"),
    (hf.oneshot, ("demo", "demo", "out"), {"protect": [0.5]}, "protect must be layers such as 0,1"),
    (hf.oneshot, ("demo", "demo", "out"), {"recipe": {}}, "recipe must be a Recipe or one of def"),
    (hf.oneshot, ("demo", "demo", "out"), {"scores": {}}, "scores must be an ImportanceTable or"),
    (hf.oneshot, ("demo", "demo", "out"), {"min_keep": torch.nan}, "min_keep must be a number"),
    (hf.prune_checkpoint, (LOADED, "out", {}), {}, "folder or hub name, got a LlamaForCausalLM"),
    (hf.prune_checkpoint, ("demo", 3, {}), {}, "out must be a path, got 3"),
    (hf.select, ({"l1": 1},), {"prune_ratio": 0.2}, "table must be the ImportanceTable .* a dict"),
    (hf.evaluate, ("demo", LOADED, [IDS]), {}, "evaluate expected a loaded causal .* got a str"),
    (hf.ImportanceTable.load, (7,), {}, "file must be a path, got 7"),
]


@pytest.mark.parametrize(("function", "args", "options", "message"), TYPES)
def test_arguments_of_another_type_are_named(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        function(*args, **options)


def test_numbers_of_numpy_and_devices_of_torch_are_taken() -> None:
    table = hf.score("demo", IDS, seed=np.int64(3), device=torch.device("cpu"), criterion="fisher")
    assert table.provenance["seed"] == 3
    keep = hf.select(table, prune_ratio=np.float32(0.5), protect=[np.int64(0)])
    assert [len(kept) for kept in keep.values()] == [384, 192, 192, 192]
