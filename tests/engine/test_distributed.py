"""Several processes on one job: their sum is the scores of one, and none outlives another's end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import (
    LOOPBACK,
    Prepare,
    count_collectives,
    fail_in_pass,
    hfprune_processes,
    kill_at,
    tokens_at_once,
)
from interruption import SEQUENCES, TOKENS, score_args, state_of
from tiny_mixtures import tiny_mixture

import hfprune_fast as hf
from hfprune_fast.config import STATISTICS

Hfprune = Callable[..., Any]
pytestmark = [
    pytest.mark.usefixtures("one_thread", "small_inputs"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


def run_together(
    number: int, *args: Any, prepare: dict[int, Prepare] | None = None
) -> tuple[list[int | None], list[str]]:
    """Exit codes of the processes, and what they print to stderr."""
    with hfprune_processes(number, *args, prepare=prepare) as processes:
        for process in processes:
            process.join(60)
        return (
            [process.exitcode for process in processes],
            [Path(f"log{rank}").read_text() for rank in range(number)],
        )


def errors_in(log: str) -> list[str]:
    """Our own; below them, torch's threads may say that they lost somebody."""
    return [line for line in log.splitlines() if line.startswith("hfprune: error: ")]


def assert_equals_one(one: str = "one", together: str = "scores") -> None:
    """The tables of a run in one process and of one in several."""
    expected, table = hf.ImportanceTable.load(one), hf.ImportanceTable.load(together)
    for name in STATISTICS:
        torch.testing.assert_close(
            getattr(table, name), getattr(expected, name), rtol=1e-12, atol=0
        )
        for ratio in (0.1, 0.2, 0.5):
            ours, theirs = (
                hf.select(t, prune_ratio=ratio, statistic=name) for t in (table, expected)
            )
            assert all(torch.equal(ours[layer], theirs[layer]) for layer in theirs)
    assert torch.equal(table.down_norm, expected.down_norm)
    entropies = [t.provenance.pop("entropy_nats") for t in (table, expected)]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-12)
    assert table.provenance == expected.provenance


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_two_processes_score_what_one_does_and_one_of_them_speaks_and_writes(
    hfprune: Hfprune, offload: str
) -> None:
    args = score_args("--offload", offload, "--json", "--save-seconds", 0)
    assert hfprune(*args, "--out", "one").code == 0
    before = set(Path.cwd().iterdir())
    codes, logs = run_together(2, *args)
    assert codes == [0, 0], logs
    assert_equals_one()
    assert json.loads(Path("log0.out").read_text())["provenance"]["samples"] == SEQUENCES
    assert f"{SEQUENCES * TOKENS // 2}/{SEQUENCES * TOKENS // 2}" in logs[0]  # the bar, of its half
    assert Path("log1.out").read_text() == logs[1] == ""
    made = {path.name for path in set(Path.cwd().iterdir()) - before}
    assert made == {"scores", "log0", "log1", "log0.out", "log1.out"}


def test_two_processes_score_experts_as_one_does(hfprune: Hfprune) -> None:
    tiny_mixture("qwen2_moe", vocab_size=2048).save_pretrained("mixture")
    args = score_args(model="mixture")
    assert hfprune(*args, "--out", "one").code == 0
    codes, logs = run_together(2, *args)
    assert codes == [0, 0], logs
    expected, table = hf.ImportanceTable.load("one"), hf.ImportanceTable.load("scores")
    assert table.statistics.keys() == expected.statistics.keys()
    for name, tensor in expected.statistics.items():
        torch.testing.assert_close(table.statistics[name], tensor, rtol=1e-12, atol=1e-300)


def test_they_agree_on_a_plan_and_add_up_in_one_exchange() -> None:
    codes, logs = run_together(2, *score_args(), prepare=dict.fromkeys((0, 1), count_collectives))
    assert codes == [0, 0], logs
    for log in logs:
        said = [line for line in log.splitlines() if line.startswith("collective")]
        assert said == ["collective broadcast", "collective all_reduce"]


@pytest.mark.parametrize("number", [2, 3])
def test_removal_costs_are_of_the_gradients_of_all(hfprune: Hfprune, number: int) -> None:
    """And of the same tokens that are drawn; with two sequences, a third process has nothing."""
    args = score_args("--criterion", "entropy", "--criterion", "fisher", "--obs", "--samples", 2,
                      "--dtype", "float64", batch_size=1)  # fmt: skip
    assert hfprune(*args, "--out", "one").code == 0
    codes, logs = run_together(number, *args)
    assert codes == [0] * number, logs
    expected, table = hf.ImportanceTable.load("one"), hf.ImportanceTable.load("scores")
    assert table.statistics.keys() == expected.statistics.keys()
    for name, tensor in expected.statistics.items():
        # The gradients' covariances are kept and added up in float32.
        rtol = 1e-4 if name == "obs" else 1e-12
        torch.testing.assert_close(table.statistics[name], tensor, rtol=rtol, atol=0)
    for name in ("entropy_nats", "sampled_cross_entropy_nats"):
        assert table.provenance[name] == pytest.approx(expected.provenance[name], rel=1e-12)


def test_all_take_the_size_that_the_first_plans(hfprune: Hfprune) -> None:
    """Memory that is free differs between them, and so may the plans; shares must not overlap."""
    assert hfprune(*score_args(batch_size=3, out="one")).code == 0
    plans = {0: tokens_at_once(3 * TOKENS), 1: tokens_at_once(6 * TOKENS)}
    codes, logs = run_together(2, *score_args(batch_size=None), prepare=plans)
    assert codes == [0, 0], logs
    assert_equals_one()


def test_pruning_together_writes_one_checkpoint(hfprune: Hfprune) -> None:
    args = ["prune", *score_args("--json")[1:], "--prune-ratio", 0.25]
    assert hfprune(*args, "--out", "one").code == 0
    codes, logs = run_together(2, *args, "--out", "pruned")
    assert codes == [0, 0], logs
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("pruned", "one")]
    assert weights[0] == weights[1]
    assert {path.name for path in Path("pruned").iterdir()} == {
        path.name for path in Path("one").iterdir()
    }
    assert json.loads(Path("log0.out").read_text())["prune_ratio"] == 0.25
    assert Path("log1.out").read_text() == logs[1] == ""


def test_what_one_process_does_the_others_leave_to_it() -> None:
    assert run_together(2, "doctor") == ([0, 0], ["", ""])
    assert "torch" in Path("log0.out").read_text()
    assert Path("log1.out").read_text() == ""


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--resume", "--resume is for one process"), ("--parity", "--parity is for one process")],
)
def test_what_takes_one_process_is_refused(flag: str, message: str) -> None:
    codes, logs = run_together(2, *score_args(flag))
    assert codes == [2, 2]
    for log in logs:
        (line,) = errors_in(log)
        assert message in line
    assert not Path("scores").exists()


@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.parametrize("how", ["killed", "an error"])
def test_when_one_dies_the_others_end_with_a_line_and_write_nothing(dying: int, how: str) -> None:
    its_end = (
        kill_at("hfprune_fast.scoring.run:Pass.add_to", 2) if how == "killed" else fail_in_pass(2)
    )
    began = time.monotonic()
    codes, logs = run_together(3, *score_args("--save-seconds", 0), prepare={dying: its_end})
    assert time.monotonic() - began < 50
    expected = [2, 2, 2]
    expected[dying] = -signal.SIGKILL if how == "killed" else 1
    assert codes == expected, logs
    for rank in {0, 1, 2} - {dying}:
        (line,) = errors_in(logs[rank])
        assert "another process of this run ended before its part was done" in line
        assert "nothing is written" in line
    if how == "an error":
        (line,) = errors_in(logs[dying])
        assert "the device fell off the bus" in line
    assert not Path("scores").exists()
    assert not state_of().exists()


def torchrun(*args: Any) -> subprocess.CompletedProcess[str]:
    """Run a program with torchrun in two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    helpers = str(Path(__file__).parents[1] / "helpers")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), helpers]))
    env = {**os.environ, **LOOPBACK, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, "--local-addr=127.0.0.1", *(str(arg) for arg in args)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_starts_them(hfprune: Hfprune) -> None:
    assert hfprune(*score_args(out="one")).code == 0
    done = torchrun("-m", "hfprune_fast", *score_args("--json"))
    assert done.returncode == 0, done.stderr
    assert_equals_one()
    assert json.loads(done.stdout)["provenance"]["samples"] == SEQUENCES
    assert done.stderr.count("hfprune: scoring with") == 1


# Where the first process is when the other dies, and where the other is then.
JOINING = ("torch.distributed:init_process_group", "hfprune_fast.scoring.score:calibrate")


@pytest.mark.slow
def test_torchrun_ends_all_when_one_is_killed_while_another_joins() -> None:
    """Without torchrun, tests above have one die in the middle."""
    Path("driver.py").write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from forked import do_first, kill_at\n"
        "from hfprune_fast.cli import main\n"
        "def wait_for_the_first():\n"
        "    while not Path('there').exists():\n"
        "        time.sleep(0.05)\n"
        "if __name__ == '__main__':\n"
        f"    first, other = {JOINING}\n"
        "    if os.environ['RANK'] == '0':\n"
        "        do_first(first, Path('there').touch)\n"
        "    else:\n"
        "        kill_at(other, 0)()\n"
        "        do_first(other, wait_for_the_first)\n"
        "    main(sys.argv[1:])\n"
    )
    done = torchrun("driver.py", *score_args())
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "nothing is written" in line]
    ours += [line for line in done.stderr.splitlines() if "hfprune: terminated" in line]
    assert len(ours) == 1, done.stderr
    assert done.stdout == ""
    assert not Path("scores").exists()
