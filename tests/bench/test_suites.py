"""The suites of bench/: they run, at tiny shapes, and refuse what is wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import meter
import pytest
import torch
from case import AbsentError, Case, Provider, measured
from gpu_timing import CASES
from records import read
from shapes import specs_of

BF16_PARTS = ("d_logits", "d_hidden", "loss", "d_gate")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_suites_at_tiny_sizes(tmp_path: Path) -> None:
    """But for the peers and Triton's kernels, which the rehearsal of gpu_check.py runs."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    others = ("compile", "Liger", "Cut", "TRL", "triton")
    env.pop("PYTEST_XDIST_WORKER", None)  # with which pytest-benchmark measures nothing
    done = subprocess.run(
        [sys.executable, "-m", "pytest", ROOT / "bench", "--tiny", "--rows", tmp_path, "-q",
         "-p", "no:cacheprovider", "-k", " and ".join(map("not {}".format, others))],
        env=env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    rows = read(path)["rows"]
    assert {row["op"] for row in rows} == {
        "softmax_entropy", "softmax_entropy_grad", "cross_entropy_grad", "fisher_grad",
        "linear_entropy", "linear_kl", "gated_taylor", "taylor_statistics", "rms_norm", "rotary",
        "compact_rows", "compact_columns", "prune_checkpoint", "score", "score_beside_another",
        "whole_job", "default_recipe",
    }  # fmt: skip
    for row in rows:
        if "skipped" not in row:
            assert row["error"] <= row["error_allowed"]
            assert row["peak_bytes"] >= 0
            assert "computes" in row
    assert not any("skipped" in row for row in rows)
    jobs = [row for row in rows if row["op"] == "whole_job"]
    assert [row["provider"] for row in jobs] == ["ours", "HFPrune's arithmetic"]
    assert all(row["kept_overlap"] > 0.9 for row in jobs)
    assert f"{path} and .md" in done.stdout
    assert path.with_suffix(".md").read_text().count("| ours, torch") == sum(
        row["provider"] == "ours, torch" for row in rows
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [("bench/results", "whole runs"), ("README.md", "must be a folder")],
)
def test_rows_that_would_be_lost_are_refused_at_once(rows: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", ROOT / "bench", "--tiny", "--rows", ROOT / rows, "-q"],
        env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr


def case_of(op: str) -> Case:
    case = CASES[op]
    return case(*specs_of({op: case}, "tiny"))


@pytest.mark.parametrize(
    ("op", "part"),
    [
        ("softmax_entropy", "loss"),
        ("softmax_entropy_grad", "d_logits"),
        ("linear_entropy", "d_hidden"),
        ("cross_entropy_grad", "d_logits"),
        ("fisher_grad", "loss"),
        ("linear_entropy", "loss"),
        ("linear_kl", "loss"),
        ("linear_kl", "d_hidden"),
        ("gated_taylor", "fisher_mask"),
        ("gated_taylor", "d_gate"),
        ("taylor_statistics", "l2"),
    ],
)
@pytest.mark.parametrize("fault", ["nan", "more", "shape", "none"])
def test_what_is_wrong_is_not_timed(op: str, part: str, fault: str) -> None:
    case = case_of(op)
    right = case.PROVIDERS["ours, torch"]

    def make(case: Case) -> Any:
        call = right.make(case)

        def wrong() -> dict[str, torch.Tensor]:
            results = {name: tensor.clone() for name, tensor in call().items()}
            if fault == "nan":
                results[part].view(-1)[-1] = torch.nan
            elif fault == "more":
                # A hundredth; four roundings of bfloat16 are more than that.
                results[part] *= 1.1 if part in BF16_PARTS else 1.01
            elif fault == "shape":
                results[part] = results[part][None]
            return results

        return wrong

    row = measured_as(case, Provider(make))
    assert ("ms" in row) == (fault == "none")
    assert ("failed" in row) == (fault != "none")
    if fault != "none":
        assert row["failed"].startswith(("wrong: ", "IndexError: "))


def test_a_peer_is_held_to_cross_entropy() -> None:
    case, name = case_of("linear_entropy"), "torch linear_cross_entropy"
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    row = measured(case, name)
    assert row["computes"] == "cross entropy"
    assert row["error"] <= row["error_allowed"]
    loss = case.PROVIDERS[name].make(case)
    assert "failed" in measured_as(case, Provider(lambda _: loss, computes="entropy"))


def measured_as(case: Case, provider: Provider) -> dict[str, Any]:
    case.PROVIDERS = {"it": provider}  # type: ignore[misc]
    return measured(case, "it")


@pytest.mark.parametrize(
    ("error", "state", "told"),
    [
        (AbsentError("no such package"), "skipped", "no such package"),
        (torch.OutOfMemoryError("2 GB"), "failed", "out of memory"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
    ],
)
def test_rows_of_what_does_not_run(error: Exception, state: str, told: str) -> None:
    def make(case: Case) -> Any:
        raise error

    assert measured_as(case_of("softmax_entropy"), Provider(make))[state] == told


@pytest.mark.skipif(meter.GPU, reason="counts a CPU's allocations")
def test_peak_memory_is_counted() -> None:
    kilobytes = 1 << 10

    def call() -> torch.Tensor:
        first = torch.zeros(kilobytes, dtype=torch.uint8)
        second = torch.zeros(3 * kilobytes, dtype=torch.uint8)
        del first
        third = torch.zeros(2 * kilobytes, dtype=torch.uint8)  # 5 with the second
        del second
        return third

    assert meter.peak_bytes(call) == 5 * kilobytes
    assert meter.peak_bytes(lambda: None) == 0
