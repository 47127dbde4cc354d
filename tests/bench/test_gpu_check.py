"""bench/gpu_check.py without a GPU: every phase at tiny sizes, with what a stock image has."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hfprune_fast import scoring, streaming

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[2]


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
    result = result_of(out)
    assert result["rehearsal"]
    phases = {name: phase["error"] for name, phase in result["phases"].items()}
    assert phases == dict.fromkeys(["build", "correctness", "timing", "tune"])

    assert result["correctness"]["failed"] == 0
    assert result["correctness"]["skipped"] > 70
    assert all("CUDA device" in text for text in result["correctness"]["skips"])

    rows = result["rows"]
    assert {row["op"] for row in rows} == {
        "softmax_entropy", "softmax_entropy_grad", "linear_entropy", "gated_taylor",
        "taylor_statistics",
    }  # fmt: skip
    for row in rows:
        assert "failed" not in row
        if "ms" in row:
            assert row["error"] <= row["error_allowed"]
            assert row["percent_of_floor"] > 0
        else:
            assert row["skipped"] in ("needs a GPU", "out of time") or "installed" in row["skipped"]
    # Ours comes first, and in the interpreter.
    measured = {row["op"] for row in rows if row["provider"] == "ours, triton" and "ms" in row}
    assert measured == {row["op"] for row in rows}
    assert {row["op"] for row in rows if "verdict" in row} == {
        "softmax_entropy_grad", "linear_entropy", "gated_taylor",
    }  # fmt: skip

    assert set(result["tune"]) == {"softmax_entropy_grad", "gated_taylor"}
    for candidates in result["tune"].values():
        assert sum(candidate["current"] for candidate in candidates) == 1
        assert all("median_ms" in candidate for candidate in candidates)
    assert_a_report(out, done.stdout)


def result_of(out: Path) -> Any:
    """The one result file there, which report.py makes a table of."""
    (path,) = out.glob("*.json")
    result = bench("records").read(path)
    assert f"## {result['rows'][0]['op']}" in bench("report").markdown(result)
    return result


def assert_a_report(out: Path, stdout: str) -> None:
    (path,) = out.glob("*.check/check.md")
    table = path.read_text()
    assert stdout.endswith(table)
    assert "numbers mean nothing" in table


ROW = {
    "provider", "batch_size", "error", "error_allowed", "planned_bytes", "planned_ratio",
    "tokens_per_s", "tflops", "percent_of_gemm",
}  # fmt: skip
SCORING_ROW = ROW | {
    "recompute", "extra_bytes", "extra_gb", "ms_per_sequence", "times_ms", "times_reference",
}  # fmt: skip
PASS = {"s", "forward_s", "head_s", "backward_s", "layer_forward_s", "layer_backward_s"}
STREAMED_ROW = ROW | PASS | {
    "layers", "pass_tokens", "planned_tokens", "passes", "flops", "layer_gb_per_s", "extrapolated",
    "peak_bytes", "reserved_bytes", "cap_bytes", "target_percent", "verdict",
}  # fmt: skip


@pytest.mark.slow
def test_rehearsal_of_what_scores(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu_check("--rehearse", "--only", "scoring", "--streamed", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(out)
    phases = {name: phase["error"] for name, phase in result["phases"].items()}
    assert phases == dict.fromkeys(["build", "scoring", "streamed"])
    assert [row["provider"] for row in result["rows"][:2]] == ["ours", "HFPrune's arithmetic"]
    assert len(result["rows"]) == 6 + 4
    for phase in ("scoring", "streamed"):
        found = result[phase]
        assert not found["errors"] + found["skipped"]
        assert found["gemm_tflops"] > 0
        for row in found["rows"]:
            assert 0 <= row["error"] <= row["error_allowed"] < 0.1
            assert row["percent_of_gemm"] > 0

    ours, targets = {"rank_correlation", "verdict", "missed"}, {}
    for row in result["scoring"]["rows"]:
        assert set(row) == SCORING_ROW | (set() if row["provider"] == "reference" else ours)
        targets[row["provider"]] = row.get("rank_correlation", 1) > 0.99
    assert targets == {
        "reference": True,
        **{f"ours, stored, {n} at once": True for n in (1, 4, 8)},
        **{f"ours, recomputed, {n} at once": True for n in (2, 4)},
    }

    rows = result["streamed"]["rows"]
    sizes = [(row["provider"], row["pass_tokens"]) for row in rows]
    assert sizes == [("disk", 128), ("disk", 192), ("cpu", 128), ("cpu", 192)]
    for row in rows:
        assert set(row) == STREAMED_ROW
        assert len(row["passes"]) >= 2
        for a_pass in row["passes"]:
            parts = a_pass["forward_s"] + a_pass["head_s"] + a_pass["backward_s"]
            assert 0 < parts <= a_pass["s"]
        assert row["extrapolated"]["layers"] > row["layers"] >= 2
        assert row["extrapolated"]["flops"] > row["flops"]
        assert row["extrapolated"]["s"] > row["s"]

    assert_a_report(out, done.stdout)
    assert done.stdout.count(", extrapolated") == len(rows)
    assert "planned/measured" in done.stdout
    assert done.stdout.count("| ours, stored") == 3


def test_a_table_of_what_failed_and_of_what_missed() -> None:
    report = bench("gpu_report")
    found = {"rows": [{"provider": "reference"}], "skipped": ["no room"], "errors": ["ours: off"]}
    for lines in (report._scoring(found), report._streamed({**found, "rows": []})):
        assert lines == ["", "- skipped: no room", "- error: ours: off", ""]
    row = {"planned_ratio": 0.5, "times_reference": 2.0, "extra_gb": 2.5, "percent_of_gemm": 59.0}
    bench("gpu_scoring").judge_targets(row, ("planner", "stored", "gemm", "memory"))
    assert row["verdict"] == "missed"
    assert [text.split()[0] for text in row["missed"]] == ["0.50", "59.00", "2.50"]
    row |= {"planned_ratio": 1.9, "percent_of_gemm": 60.0, "extra_gb": 1.0}
    bench("gpu_scoring").judge_targets(row, ("planner", "stored", "gemm", "memory"))
    assert (row["verdict"], row["missed"]) == ("pass", [])


def bench(name: str) -> Any:
    """A module of bench/, at its rehearsal's sizes."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the sizes are real")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def progress(phase: str, folder: Path) -> Any:
    made = bench("gpu_progress").Progress(phase, folder / "found.json", 60)
    made.result["gemm_tflops"] = 1.0
    return made


@pytest.fixture
def streamed(tmp_path: Path) -> Any:
    """A tiny checkpoint and what its resident model scores."""
    folder = tmp_path / "model"
    folder.mkdir()
    module = bench("gpu_streamed")
    layers = bench("models").write_checkpoint(
        folder, module.SHAPE, most_layers=3, deadline=time.monotonic() - 1
    )
    assert layers == 2  # the least, as there is no time
    return module.Streamed(folder, layers)


def test_wrong_scores_of_a_model_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence of eight that is lost in one layer is an eighth of its scores."""
    module = bench("gpu_scoring")
    subject = module.Subject()
    right = module.Subject.ours

    def ours(self: Any, way: Any, totals: Any = None) -> Any:
        found = right(self, way, totals)
        if way.batch_size == 4:
            found.statistics[0, 0, 1] *= 7 / 8
        return found

    monkeypatch.setattr(module.Subject, "ours", ours)
    made = progress("scoring", tmp_path)
    ways = {way.name: way for way in subject.ways()}
    calls = module.checked(subject, ways, made)
    wrong = {name for name, way in ways.items() if way.batch_size == 4}
    assert set(calls) == {"reference", *ways} - wrong
    assert [error.split(": ")[:2] for error in made.result["errors"]] == [
        [name, "ValueError"] for name in ways if name in wrong
    ]
    assert all("layer 1 is off" in error for error in made.result["errors"])
    judge = module.Judge(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="layer 1"):
        judge.check("nan", torch.tensor([[1.0, 1, 1], [1, torch.nan, 1]]))


def test_a_layer_with_the_weights_of_another_is_seen(
    streamed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = progress("streamed", tmp_path)
    streamed.measure("cpu", made, time.monotonic() - 1)
    assert len(made.result["rows"]) == len(made.result["skipped"]) == 1  # out of time
    fill = streaming._Buffered._fill

    def mistaken(self: Any, slot: Any, layer: int) -> None:
        fill(self, slot, 0 if layer == 1 else layer)

    monkeypatch.setattr(streaming._Buffered, "_fill", mistaken)
    with pytest.raises(ValueError, match=r"offload cpu, .*: the l1 of layer 1 is off"):
        streamed.measure("cpu", made, time.monotonic())


def test_out_of_memory_is_no_other_way(
    streamed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(scoring, "linear_entropy", full)
    with pytest.raises(RuntimeError, match="not what was asked for: out of memory; going on with"):
        streamed.measure("disk", progress("streamed", tmp_path), time.monotonic())


def test_flops_executed_are_those_counted(streamed: Any) -> None:
    module = bench("gpu_streamed")
    with FlopCounterMode(display=False) as counter:
        streamed.resident_l1()  # twice, in micro-batches of two sizes
    counts = counter.get_flop_counts()["Global"]
    products = ("aten.mm", "aten.addmm", "hfprune_fast.linear_criterion")
    counted = sum(count for op, count in counts.items() if str(op) in products)
    tokens = module.PASS_SEQUENCES[0] * module.SEQ_LEN
    assert counted == 2 * module.executed_flops(streamed.layers, tokens)
