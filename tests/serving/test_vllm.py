"""Pruned models in vLLM: transformers' perplexity of 256 tokens, and its next 8 greedy ones."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from served import RANDOM, TRAINED, Reference, Row, hfprune

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
WORKER = Path(__file__).parent / "vllm_worker.py"


def run(folder: Path, ids: list[int], scratch: Path, *trust: str, plugins: str | None) -> Any:
    """Return what vLLM makes of a model, or its error."""
    (scratch / "ids.json").write_text(json.dumps(ids))
    command = [sys.executable, "-P", str(WORKER), str(folder), str(scratch / "ids.json")]
    env = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules")}
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    done = subprocess.run(
        [*command, str(scratch / "out.json"), *trust],
        env=env, capture_output=True, text=True, timeout=600, cwd=scratch,
    )  # fmt: skip
    if done.returncode != 0:
        return done.stdout + done.stderr
    return json.loads((scratch / "out.json").read_text())


@pytest.fixture
def check(
    transformers_of: Callable[[Path], Reference], keep: Callable[[Row], None], tmp_path: Path
) -> Callable[..., None]:
    def check(model: str, form: str, folder: Path, pruned: Path, *trust: str, **how: Any) -> None:
        expected = transformers_of(pruned)
        found = run(folder, expected.ids, tmp_path, *trust, **how)
        assert isinstance(found, dict), found[-3000:]
        keep(Row(model, form, "vLLM", found["perplexity"], expected.perplexity))
        # Both sum float32 products in their own order.
        assert math.isclose(found["perplexity"], expected.perplexity, rel_tol=1e-4)
        assert found["greedy"] == expected.greedy

    return check


@pytest.mark.parametrize("model", [*TRAINED, *RANDOM])
def test_our_plugin_runs_the_default_result(model: str, pruned: Any, check: Any) -> None:
    folder = pruned(model, "default")
    check(model, "default", folder, folder, plugins=None)


def test_a_uniform_model_needs_no_plugin(pruned: Any, check: Any) -> None:
    folder = pruned("demo", "uniform")
    check("demo", "uniform", folder, folder, plugins="")


@pytest.mark.parametrize("model", ["demo", "qwen2", "mistral"])
def test_decilm_needs_no_plugin(model: str, pruned: Any, check: Any, tmp_path: Path) -> None:
    folder, out = pruned(model, "default"), tmp_path / "decilm"
    hfprune("export", folder, "--to", "decilm", "--out", out)
    check(model, "decilm", out, folder, "trust", plugins="")


def test_padded_needs_no_plugin(pruned: Any, check: Any, tmp_path: Path) -> None:
    folder, out = pruned("qwen3-tied", "default"), tmp_path / "padded"
    hfprune("export", folder, "--to", "padded", "--out", out)
    check("qwen3-tied", "padded", out, folder, plugins="")


def test_remote_code_runs_in_its_transformers_backend(pruned: Any, check: Any) -> None:
    folder = pruned("qwen3-tied", "default")
    check("qwen3-tied", "remote code", folder, folder, "trust", plugins="")
