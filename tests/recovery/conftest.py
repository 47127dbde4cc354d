"""The shipped model with half of its neurons cut, in every layout, and a short recovery of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_recovery import SHORT

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.source import open_source

TEXT_CHARS = 12_000


@pytest.fixture(scope="session")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a folder of the shipped model, cut to half by no merit: uniform, custom or padded."""
    folder, made = tmp_path_factory.mktemp("halves"), dict[str, Path]()

    def make(layout: str) -> Path:
        if layout not in made:
            widths = open_source(TINY_MODEL).spec.widths
            shift = 0 if layout == "uniform" else 8
            keep = {
                layer: torch.arange(width // 2 + shift * (layer % 3 - 1))
                for layer, width in enumerate(widths)
            }
            made[layout] = folder / layout
            named = "auto" if layout == "uniform" else layout
            record = {"requested": {"note": 1}, "provenance": {"tokens": 7}}
            hf.prune_checkpoint(TINY_MODEL, made[layout], keep, layout=named, record=record)
        return made[layout]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((TINY_MODEL / "calibration.txt").read_text(encoding="utf-8")[:TEXT_CHARS])
    return path


@pytest.fixture(scope="session")
def whole(
    halves: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `recover()` returns, in one thread; nothing writes to its folder."""
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("whole") / "out"
    torch.set_num_threads(1)
    try:
        return hf.recover(TINY_MODEL, halves("custom"), text, out, **SHORT)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def recover(
    halves: Callable[[str], Path], text: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Recover a half of the shipped model in twelve steps: recover("custom", lora=4)."""

    def run(layout: str = "custom", out: str = "out", **options: Any) -> dict[str, Any]:
        given = SHORT | {"text": text, "dense": TINY_MODEL} | options
        dense, source = given.pop("dense"), given.pop("text")
        return hf.recover(dense, halves(layout), source, tmp_path / out, **given)

    return run
