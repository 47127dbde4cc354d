"""An interrupted run is resumed, and gives the same bits as an uninterrupted one."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Prepare, fail_in_pass, hfprune_process, kill_at, kill_between
from interruption import (
    SEQUENCES,
    TOKENS,
    assert_whole,
    interrupt,
    kept_samples,
    score_args,
    state_of,
)
from refusals import assert_refused
from safetensors import safe_open

import hfprune_fast as hf
from hfprune_fast.engine import planner
from hfprune_fast.errors import ResumeError
from hfprune_fast.kernels import linear_entropy
from hfprune_fast.scoring import criteria, passes
from hfprune_fast.scoring.accumulator import ScoreAccumulator

Hfprune = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread", "small_inputs")


def kill(*args: Any, prepare: Prepare) -> None:
    """Run a command line until it is killed."""
    log = Path("log")
    with hfprune_process(*args, log=log, prepare=prepare) as process:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, log.read_text()


@pytest.mark.parametrize(("offload", "dtype"), [("none", "float32"), ("disk", "float64")])
def test_killed_again_and_again_the_scores_are_those_of_one_run(
    hfprune: Hfprune, offload: str, dtype: str
) -> None:
    way = ["--offload", offload, "--dtype", dtype]
    args = score_args(*way, "--save-seconds", 0, batch_size=1)
    assert hfprune(*args, "--out", "whole").code == 0
    seed = random.randrange(1 << 30)
    moments, kept = random.Random(seed), [0]
    for _ in range(3):
        resume = ["--resume"] if kept[-1] else []
        kill(*args, *resume, prepare=kill_between(moments.randrange(25_000), 2 * TOKENS))
        kept.append(kept_samples(state_of()))
        assert kept[-2] < kept[-1] < SEQUENCES, (seed, kept)
    run = hfprune(*args, "--resume")
    assert_whole(run)
    assert f"continuing after {kept[-1]} sequences" in run.err
    left_tokens = (SEQUENCES - kept[-1]) * TOKENS
    assert f" {left_tokens}/{left_tokens} " in run.err, (seed, run.err)  # the bar


@pytest.mark.parametrize(
    ("moment", "number", "kept"),
    [
        ("os:fsync", 3, 6),  # while the state is written, the earlier one is whole
        ("pathlib:Path.replace", 3, 6),
        ("hfprune_fast:ImportanceTable.save", 0, SEQUENCES),  # all is scored but not written
    ],
)
def test_killed_at_a_moment_the_state_is_whole(
    hfprune: Hfprune, moment: str, number: int, kept: int
) -> None:
    assert hfprune(*score_args(out="whole")).code == 0
    kill(*score_args("--save-seconds", 0), prepare=kill_at(moment, number))
    assert kept_samples(state_of()) == kept
    assert_whole(hfprune(*score_args("--resume")))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_scored_and_says_how_to_go_on(
    hfprune: Hfprune, interrupted: Hfprune, how: signal.Signals
) -> None:
    assert hfprune(*score_args(out="whole")).code == 0
    run = interrupted(*score_args(), how=how)
    assert "hfprune: 8 of 24 sequences are saved in scores.state; the same command wi" in run.err
    assert not Path("scores").exists()
    run = interrupted(*score_args("--resume"), how=how)
    assert "hfprune: continuing after 8 sequences, from scores.state" in run.err.splitlines()
    assert "hfprune: 16 of 24 sequences are saved in scores.state" in run.err
    assert_whole(hfprune(*score_args("--resume")))


def test_an_error_keeps_what_is_scored_too(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hfprune(*score_args(out="whole")).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(passes.Pass, "add_to", passes.Pass.add_to)  # is undone
        fail_in_pass(5)()
        done = hfprune(*score_args())
    assert done.code == 1
    assert "the device fell off the bus" in done.err.splitlines()[-1]
    assert "10 of 24 sequences are saved" in done.err
    assert_whole(hfprune(*score_args("--resume")))


def test_before_the_first_pass_nothing_is_kept(interrupted: Hfprune) -> None:
    run = interrupted(*score_args(), at_pass=0)
    assert "kept" not in run.err
    assert not state_of().exists()


def test_pruning_goes_on_too(hfprune: Hfprune, interrupted: Hfprune) -> None:
    args = ["prune", *score_args(out="pruned")[1:], "--prune-ratio", 0.25]
    assert hfprune(*args, "--out", "whole").code == 0
    interrupted(*args)
    assert_refused(hfprune(*args), r"an interrupted run has left pruned\.state; --resume")
    run = hfprune(*args, "--resume")
    assert run.code == 0, run.err
    assert "continuing after 8 sequences" in run.err
    for path in Path("whole").iterdir():
        assert (Path("pruned") / path.name).read_bytes() == path.read_bytes()
    assert not state_of("pruned").exists()


def test_the_head_goes_on_in_chunks_of_the_same_size(
    hfprune: Hfprune, interrupted: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which follow the memory that was free when the run began."""
    budgets: list[int | None] = []

    def watched(*args: Any, logits_budget_bytes: int | None, **options: Any) -> Any:
        budgets.append(logits_budget_bytes)
        return linear_entropy(*args, logits_budget_bytes=logits_budget_bytes, **options)

    monkeypatch.setattr(criteria, "linear_entropy", watched)
    interrupted(*score_args("--memory-budget", "100MB"))
    assert hfprune(*score_args("--resume", "--memory-budget", "8GB")).code == 0
    (budget,) = set(budgets)
    assert budget is not None
    assert budget < 100e6


def test_totals_in_bfloat16_go_on_bit_for_bit(hfprune: Hfprune, interrupted: Hfprune) -> None:
    args = score_args("--parity", "--dtype", "bfloat16", batch_size=1)
    assert hfprune(*args, "--out", "whole").code == 0
    interrupted(*args, at_pass=11)
    with safe_open(state_of(), framework="pt") as opened:
        assert opened.get_tensor("statistics").dtype == torch.bfloat16
    assert kept_samples(state_of()) == 11
    assert_whole(hfprune(*args, "--resume"))


def too_little_memory(patch: pytest.MonkeyPatch, *fits: tuple[int, int]) -> None:
    """From the sequences done on, so many fit at once: (0, 3), (10, 2)."""
    add_to = passes.Pass.add_to

    def short(self: Any, totals: ScoreAccumulator) -> ScoreAccumulator:
        most = max((done, most) for done, most in fits if done <= totals.samples)[1]
        if max(len(batch.ids) for batch in self.batches) > most:
            raise MemoryError
        return add_to(self, totals)

    patch.setattr(passes.Pass, "add_to", short)


@pytest.mark.parametrize("at_pass", [1, 4, 6, 8])
def test_after_halving_the_halved_size_is_kept(
    hfprune: Hfprune, interrupted: Hfprune, monkeypatch: pytest.MonkeyPatch, at_pass: int
) -> None:
    """Fives are halved twice, to 2, 2, 1, and when ten are done to ones; interrupted anywhere."""
    fives = score_args(batch_size=5)
    with monkeypatch.context() as patch:
        too_little_memory(patch, (0, 2), (10, 1))
        assert hfprune(*fives, "--out", "whole").code == 0
        interrupted(*fives, at_pass=at_pass)
        assert kept_samples(state_of()) == [2, 4, 5, 7, 9, 10, 11, 12][at_pass - 1]
        if at_pass > 6:
            patch.undo()  # what is halved stays so, also when there is memory again
        run = hfprune(*fives, "--resume")
    assert_whole(run)


def test_without_a_batch_size_it_is_that_of_the_state(
    hfprune: Hfprune, interrupted: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = score_args(batch_size=None)
    monkeypatch.setitem(planner._TOKENS_AT_ONCE, "cpu", 3 * TOKENS)
    assert hfprune(*args, "--out", "whole").code == 0
    interrupted(*args)
    assert kept_samples(state_of()) == 12
    monkeypatch.setitem(planner._TOKENS_AT_ONCE, "cpu", 5 * TOKENS)
    assert_whole(hfprune(*args, "--resume"))
    assert hf.ImportanceTable.load("scores").provenance["batch_size"] == 3


def test_batches_from_python_go_on_and_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.from_numpy(np.load("ids.npy"))
    batches = [ids[:5], ids[5:6, :3], ids[6:16], ids[16:]]
    how: dict[str, Any] = {"state_file": "kept", "save_seconds": 0}
    whole = hf.score("model", batches)
    with monkeypatch.context() as patch:
        interrupt(patch, at_pass=2)
        with pytest.raises(KeyboardInterrupt):
            hf.score("model", batches, **how)
    assert kept_samples(Path("kept")) == 6
    with pytest.raises(ResumeError, match=r"another run: batches [^;]*; --force"):
        hf.score("model", [*batches[:3], ids[16:20], ids[20:]], **how, resume=True)
    table = hf.score("model", batches, **how, resume=True)
    for name, tensor in whole.statistics.items():
        assert torch.equal(table.statistics[name], tensor), name
    assert table.provenance == whole.provenance
