"""bench/gpu_check.py without a GPU: every phase at tiny sizes, with what a stock image has."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parent.parent


def gpu_check(*arguments: str, pythonpath: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(pythonpath or "")}
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_check.py"), *arguments],
        env=env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_no_device(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_is_no_result() -> None:
    done = gpu_check("--rehearse", "--out", str(ROOT / "bench" / "results" / "new"))
    assert done.returncode == 2
    assert "outside bench/results" in done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    absent = tmp_path / "absent"  # what development needs and a stock image lacks
    absent.mkdir()
    for name in ("hypothesis", "pytest_timeout", "pytest_benchmark"):
        (absent / f"{name}.py").write_text("raise ImportError('not in a stock image')\n")
    out = tmp_path / "out"
    done = gpu_check("--rehearse", "--tune", "--out", str(out), pythonpath=absent)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["rehearsal"]
    phases = {name: phase["error"] for name, phase in result["phases"].items()}
    assert phases == dict.fromkeys(["build", "correctness", "timing", "tune"])

    assert result["correctness"]["failed"] == 0
    assert result["correctness"]["skipped"] > 70
    assert all("CUDA device" in text for text in result["correctness"]["skips"])

    rows = result["rows"]
    assert Counter(row["op"] for row in rows) == {
        "softmax_entropy": 3,
        "softmax_entropy backward": 1,
        "softmax_entropy_grad_": 3,
        "linear_entropy": 3,
        "linear_entropy fp32": 1,
        "taylor_statistics": 3,
        "gated_taylor": 3,
    }
    assert len({(row["op"], row["shape"]) for row in rows}) == len(rows)
    for row in rows:
        providers = {"ours"} | ({"gemms"} if "linear" in row["op"] else set())
        providers |= set() if "fp32" in row["op"] else {"eager"}
        assert set(row["times"]) == providers
        assert row["percent_of_floor"] > 0
    assert [row["op"] for row in rows if "verdict" in row] == [
        "softmax_entropy_grad_",
        "linear_entropy",
        "gated_taylor",
    ]

    assert set(result["tune"]) == {"softmax_entropy_grad_", "gated_taylor"}
    for candidates in result["tune"].values():
        assert sum(candidate["current"] for candidate in candidates) == 1
        assert all("median_ms" in candidate for candidate in candidates)

    table = (out / "result.md").read_text()
    assert done.stdout.endswith(table)
    assert "numbers mean nothing" in table
