"""Pruned models to export, and the command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from truth import tiny_model
from uneven import keep_of

import hfprune_fast as hf

Export = Callable[..., dict[str, Any]]


@pytest.fixture
def export(hfprune: Callable[..., Any]) -> Export:
    def run(*arguments: Any) -> dict[str, Any]:
        done = hfprune("export", *arguments, "--json")
        assert done.code == 0, done.err
        found: dict[str, Any] = done.json()
        return found

    return run


@pytest.fixture
def pruned(save_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(family: str = "llama", layout: str = "custom", **options: Any) -> Path:
        dense = save_checkpoint(tiny_model(family, **options), f"dense-{family}")
        out = tmp_path / f"{family}-{layout}"
        hf.prune_checkpoint(
            dense, out, keep_of(), layout=layout, record={"provenance": {"tokens": 7}}
        )
        return out

    return make
