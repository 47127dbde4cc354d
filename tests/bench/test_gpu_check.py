"""bench/gpu without a GPU: every phase at tiny sizes, with what a stock image has."""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from records import read
from report import markdown
from torch.utils.flop_counter import FlopCounterMode
from unoptimised import unoptimised_cxx

from hfprune_fast.engine import weights

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[2]
WHOLE_JOBS = ("scoring", "recipe", "commands", "tuning", "streamed")
KERNELS = {
    "softmax_entropy", "softmax_entropy_grad", "cross_entropy_grad", "fisher_grad",
    "linear_entropy", "linear_kl", "gated_taylor", "taylor_statistics", "rms_norm", "rotary",
}  # fmt: skip
NEEDED = {"provider", "error", "error_allowed", "planned_bytes", "verdict", "percent_of_floor"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no CUDA device"),
        (("--rehearse", "--out", ROOT / "bench/results/new"), "outside bench/results"),
        (("--limit", "timing=40"), "more than 40 seconds"),
        (("--limit", "lunch=3600"), "expected PHASE=S"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, arguments: tuple[Any, ...], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["gpu_check.py", "--out", tmp_path / "out", *arguments]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in argv])
    with pytest.raises(SystemExit) as refused:
        importlib.import_module("gpu_check").main()
    assert refused.value.code == 2
    out, err = capsys.readouterr()
    assert said in err
    assert not out
    assert not (tmp_path / "out").exists()


@pytest.fixture
def rehearsed(tmp_path: Path) -> Any:
    """The result of a rehearsal of all phases, in an image without what it may lack."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("hypothesis", "pytest_timeout", "matplotlib"):
        (absent / f"{name}.py").write_text("raise ImportError('not in a stock image')\n")
    out, phases = tmp_path / "out", ["correctness", "timing", "refit", *WHOLE_JOBS]
    limits = [f"{name}=600" for name in ("build", "compile", *phases)]  # on a busy machine
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(absent)}
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu" / "gpu_check.py", "--rehearse", "--commit",
         "abc123", "--only", *phases, "--out", out, "--limit", *limits],
        env=env | unoptimised_cxx(tmp_path), capture_output=True, text=True, timeout=1180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.json")
    result = read(path)
    errors = {name: phase["error"] for name, phase in result["phases"].items()}
    assert errors == dict.fromkeys(["build", "compile", *phases])
    assert (result["rehearsal"], result["commit"]) == (True, "abc123")
    (table,) = (check.read_text() for check in out.glob("*.check/check.md"))
    assert table.endswith(markdown(result))
    assert done.stdout.endswith(table)
    assert "numbers mean nothing" in table
    return result


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rehearsal(rehearsed: Any) -> None:
    count, *reasons = rehearsed["phases"]["correctness"]["tests"]
    assert re.match(r"1\d\d skipped\b", count)
    assert all("CUDA device" in reason for reason in reasons)
    assert_kernels_are_timed([row for row in rehearsed["rows"] if row["op"] in KERNELS])
    assert_whole_jobs_are_right([row for row in rehearsed["rows"] if row["op"] not in KERNELS])
    told = [line.partition(": ")[0] for line in rehearsed["phases"]["commands"]["tests"]]
    assert told[-2:] == ["prune, paper", "recover, teacher cached"]
    assert "scores, cpu float32, obs" in told


def assert_kernels_are_timed(rows: list[Any]) -> None:
    assert {row["op"] for row in rows} == KERNELS
    for row in rows:
        assert "failed" not in row
        if "ms" in row:
            assert row["error"] <= row["error_allowed"]
            assert row["percent_of_floor"] > 0
        else:
            assert row["skipped"] in ("needs a GPU", "out of time") or "installed" in row["skipped"]
    # In the interpreter, which no other test of bench/ runs.
    measured = {row["op"] for row in rows if row["provider"] == "ours, triton" and "ms" in row}
    assert measured == {row["op"] for row in rows}
    assert {row["op"] for row in rows if "verdict" in row} <= measured


def assert_whole_jobs_are_right(found: list[Any]) -> None:
    assert sum(row["op"] in ("refit", "removal_costs") for row in found) == 2
    assert [row["provider"] for row in found if row["op"] == "default_recipe"] == [
        "scoring", "removal costs", "allocation", "refit", "writing", "all",
    ]  # fmt: skip
    tuned = {row["provider"]: row["ms"] for row in found if "configurations" in row["op"]}
    assert tuned.keys() == {"ours, LANES 1024 num_warps 32" + more for more in ("", " maxnreg 64")}
    rows = [row for row in found if row["op"] == "score"]
    assert [row["provider"] for row in rows] == [
        "ours", *(f"ours, stored, {n} at once" for n in (1, 4)),
        *(f"ours, recomputed, {n} at once" for n in (2, 4)), "HFPrune's arithmetic",
        *(f"ours, offload={offload}" for offload in ("disk", "disk", "cpu", "cpu")),
    ]  # fmt: skip
    for row in rows:
        assert 0 <= row["error"] <= row["error_allowed"] < 0.1
        assert row.keys() >= NEEDED or row["provider"].startswith("HFPrune")
        assert row.get("times_reference", 1) < 50, "what is timed does nothing"
    streamed = rows[6:]
    assert [row["sizes"]["T"] for row in streamed] == [128, 192, 128, 192]
    for row in streamed:
        assert len(row["passes_s"]) >= 2
        assert row["extrapolated_s"]["6"] > row["ms"] / 1e3


def bench(name: str) -> Any:
    """Return a module of bench/gpu, at its rehearsal's sizes."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the sizes are real")
    return importlib.import_module(name)


def phase(folder: Path) -> Any:
    return bench("gpu_phase").Phase(folder / "found.json", 60)


def test_what_missed_its_targets_says_so() -> None:
    scoring = bench("gpu_scoring")
    row = {"peak_bytes": 2.5e9, "planned_ratio": 0.5, "times_reference": 1.0}
    lean = row | {"percent_of_floor": 59, "provider": scoring.LEAN}
    told = "0.50 of the peak was planned, not 0.8; 2.50 GB beside the weights, not 2"
    assert scoring.judged(lean) == told
    row |= {"planned_ratio": 1.9, "percent_of_floor": 60, "provider": scoring.OURS}
    assert scoring.judged(row) == "1.00 x the reference's speed, not 1.8"
    assert scoring.judged(row | {"times_reference": 1.9}) == "pass"


def test_wrong_scores_of_a_model_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence of eight that is lost in one layer is an eighth of its scores."""
    module = bench("gpu_scoring")
    subject, right = module.Subject(), module.Subject.ours

    def ours(self: Any, plan: Any) -> Any:
        l1 = right(self, plan)
        if plan.batch_size == 4:
            l1[1] *= 7 / 8
        return l1

    monkeypatch.setattr(module.Subject, "ours", ours)
    made, plans = phase(tmp_path), subject.plans()
    wrong = [name for name, plan in plans.items() if plan.batch_size == 4]
    assert set(module.checked(subject, plans, made)) == {module.REFERENCE, *plans} - {*wrong}
    assert [error.split(": ")[0] for error in made.result["errors"]] == wrong
    assert all("layer 1 is off" in error for error in made.result["errors"])
    with pytest.raises(ValueError, match="layer 1"):
        bench("models").checked("nan", torch.tensor([0.0, torch.nan]), torch.ones(2))


@pytest.fixture
def streamed(tmp_path: Path) -> Any:
    """A tiny checkpoint and what its resident model scores."""
    folder = tmp_path / "model"
    module = bench("gpu_streamed")
    layers = bench("models").write_checkpoint(folder, module.SHAPE, 3, time.monotonic() - 1)
    assert layers == 2  # the least, as there is no time
    return module.Streamed(folder, layers, 1e12)


def test_a_layer_with_the_weights_of_another_is_seen(
    streamed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = phase(tmp_path)
    streamed.measure("cpu", made, time.monotonic() - 1)
    assert len(made.rows) == len(made.result["skipped"]) == 1  # out of time
    fill = weights.BufferedWeights._fill

    def mistaken(self: Any, slot: Any, layer: int) -> None:
        fill(self, slot, 0 if layer == 1 else layer)

    monkeypatch.setattr(weights.BufferedWeights, "_fill", mistaken)
    with pytest.raises(ValueError, match=r"offload cpu, .*: the l1 of layer 1 is off"):
        streamed.measure("cpu", made, time.monotonic())


def test_flops_executed_are_those_counted(streamed: Any) -> None:
    module = bench("gpu_streamed")
    sequences = module.PASS_SEQUENCES[0]
    with FlopCounterMode(display=False) as counter:
        streamed.resident_l1(streamed.plan("none", sequences), sequences)
    counts = counter.get_flop_counts()["Global"]
    products = ("aten.mm", "aten.addmm", "hfprune_fast.linear_criterion")
    counted = sum(count for op, count in counts.items() if str(op) in products)
    assert counted == module.executed_flops(streamed.layers, sequences * module.SEQ_LEN)
