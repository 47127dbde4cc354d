"""Memory that runs out in the middle: the pass is undone and run again in smaller pieces."""

import gc
import re
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from truth import tiny_model
from watch import Watch

from hfprune_fast.checkpoint import loading
from hfprune_fast.data.batches import MicroBatch
from hfprune_fast.engine import mlp_hooks, weights
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.engine.streaming import open_model
from hfprune_fast.errors import MemoryShortageError
from hfprune_fast.scoring import criteria, passes, run
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.sums import PassOptions

SEQUENCES, TOKENS, VOCAB = 16, 9, 127
LENGTHS = [TOKENS, TOKENS, TOKENS, 5] * 4  # of every four sequences one is padded
STORED, RECOMPUTED = PassOptions(), PassOptions(recompute=True)
STREAMED = PassOptions(recompute=True, pass_tokens=8 * TOKENS)  # two micro-batches of 4 a pass
WAYS = pytest.mark.parametrize(
    "how", [STORED, RECOMPUTED, STREAMED], ids=["stored", "recomputed", "streamed"]
)
FIRST, MIDDLE, LAST = range(3)  # layers
PLACES = ["head", *((way, at) for way in ("forward", "backward") for at in (FIRST, MIDDLE, LAST))]

Make = Callable[..., ResidentModel]
pytestmark = pytest.mark.usefixtures("one_thread")


def sequences(*sizes: int) -> list[MicroBatch]:
    """The same sequences each time, in micro-batches of these sizes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (SEQUENCES, TOKENS), generator=generator)
    ends = list(accumulate(sizes, initial=0))
    assert ends[-1] == SEQUENCES
    return [MicroBatch(ids[begin:end], tuple(LENGTHS[begin:end])) for begin, end in pairwise(ends)]


@pytest.fixture
def model(save_checkpoint: Callable[..., Path]) -> Make:
    """The same model, resident or streamed from its file."""
    folder = save_checkpoint(tiny_model("llama", dtype=torch.float32))

    def make(how: PassOptions, offload: str = "disk") -> ResidentModel:
        blueprint = loading.blueprint(folder, device="cpu")
        return open_model(blueprint, offload if how.pass_tokens else "none")

    return make


def allocation_error() -> Exception:
    """What torch's CPU allocator raises."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    return RuntimeError(str(raised.value))


def fail(
    patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], error: Exception
) -> None:
    """Raise instead of calling a function, whenever its arguments say so."""
    function = getattr(owner, name)

    def failing(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            raise error
        return function(*args, **options)

    patch.setattr(owner, name, failing)


def nth(number: int) -> Callable[..., bool]:
    """Whether this is the call of that number, from 0."""
    calls = iter(range(1 << 30))
    return lambda *_, **__: next(calls) == number


def fail_at(patch: pytest.MonkeyPatch, where: Any, how: PassOptions, error: Exception) -> None:
    """Raise once, in the last micro-batch of the second pass."""
    in_a_pass = 2 if how.pass_tokens else 1
    this = nth(2 * in_a_pass - 1)
    if where == "head":
        fail(patch, criteria, "linear_entropy", this, error)
        return
    way, layer = where
    if way == "forward":

        def at_layer(_: Any, at: int, *__: Any) -> bool:
            making_graph_again = how.recompute and torch.is_grad_enabled()
            return at == layer and not making_graph_again and this()

        fail(patch, ResidentModel, "run", at_layer, error)
    elif layer == FIRST:
        fail(patch, mlp_hooks, "taylor_statistics", this, error)
    else:  # from the last layer on, each with all micro-batches of the pass
        before = in_a_pass * (2 + LAST - layer)
        fail(patch, mlp_hooks, "gated_taylor", nth(before + in_a_pass - 1), error)


def assert_same(ours: ScoreAccumulator, theirs: ScoreAccumulator) -> None:
    assert torch.equal(ours.statistics, theirs.statistics)
    assert torch.equal(ours.down_norm, theirs.down_norm)
    assert (ours.samples, ours.tokens) == (theirs.samples, theirs.tokens)
    assert ours.loss_nats == theirs.loss_nats


@WAYS
@pytest.mark.parametrize("where", PLACES, ids=str)
def test_the_pass_is_run_again_in_halves_and_nothing_counts_twice(
    model: Make, how: PassOptions, where: Any,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = 2 if how.pass_tokens else 1  # micro-batches of 4 before the error
    halved = [4] * whole + [2] * ((SEQUENCES - 4 * whole) // 2)
    counts, commits = [0.0], []
    with model(how) as scored:
        expected = score_batches(scored, sequences(*halved), how)
        fail_at(monkeypatch, where, how, allocation_error())
        totals = score_batches(
            scored, sequences(4, 4, 4, 4), how,
            on_commit=lambda totals, most: commits.append((totals.samples, most)),
            on_progress=lambda tokens: counts.append(counts[-1] + tokens),
        )  # fmt: skip
    assert_same(totals, expected)
    assert (totals.samples, totals.tokens) == (SEQUENCES, sum(LENGTHS))
    assert commits[0] == (4 * whole, 4)
    assert {most for _, most in commits[1:]} == {2}
    assert counts[-1] == pytest.approx(totals.tokens, abs=1e-9)
    assert min(counts) >= 0
    assert max(counts) <= totals.tokens + 1e-9
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("hfprune: out of memory; continuing with micro-batches of 2")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),  # of pinned memory
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),  # Windows
    ],
    ids=repr,
)
def test_every_class_of_out_of_memory_is_known(
    model: Make, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model(STORED) as scored:
        expected = score_batches(scored, sequences(4, *[2] * 6), STORED)
        fail_at(monkeypatch, ("backward", MIDDLE), STORED, error)
        assert_same(score_batches(scored, sequences(4, 4, 4, 4), STORED), expected)


def test_another_runtime_error_is_not_swallowed(
    model: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, ("backward", MIDDLE), STORED, RuntimeError("shapes do not match"))
    with model(STORED) as scored, pytest.raises(RuntimeError, match="shapes do not match"):
        score_batches(scored, sequences(4, 4, 4, 4), STORED)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "number"), [("_new_slot", 1), ("_on_host", 0), ("_on_host", 1), ("_on_host", 9)]
)
def test_weights_on_their_way_may_run_out_of_memory_too(
    model: Make, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the buffers are made, or in the thread that fills them."""
    halved = [4] * (2 if number == 9 else 0)  # in the second pass
    halved += [2] * ((SEQUENCES - sum(halved)) // 2)
    with model(STREAMED, offload="cpu") as scored:
        expected = score_batches(scored, sequences(*halved), STREAMED)
    fail(monkeypatch, weights.BufferedWeights, name, nth(number), MemoryError())
    with model(STREAMED, offload="cpu") as scored:
        assert_same(score_batches(scored, sequences(4, 4, 4, 4), STREAMED), expected)


def test_odd_sizes_are_halved_again_and_again(model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 -> 3, 2 -> of what is left of the 5, again from its front: 2, 1 of 3 left, 1s at last."""
    sizes: list[int] = []

    def too_much(batch: Any, *_: Any, **__: Any) -> bool:
        """At most 3 fit at first, from the third sequence on 2, from the tenth on one."""
        fits = 3 if sum(sizes) < 2 else 2 if sum(sizes) < 10 else 1
        return batch.shape[0] // TOKENS > fits

    with model(STORED) as scored:
        fail(monkeypatch, criteria, "linear_entropy", too_much, allocation_error())
        totals = score_batches(
            scored, sequences(5, 5, 6), STORED,
            on_commit=lambda totals, _: sizes.append(totals.samples - sum(sizes)),
        )  # fmt: skip
        monkeypatch.undo()
        assert sizes == [3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
        assert_same(totals, score_batches(scored, sequences(*sizes), STORED))


def test_at_one_sequence_layers_are_recomputed(
    model: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the same bits: recomputing runs the same operations."""
    ones = sequences(*[1] * SEQUENCES)

    def storing(*_: Any, only_backward: bool, **__: Any) -> bool:
        return not only_backward

    with model(STORED) as scored:
        expected = score_batches(scored, ones, STORED)
        fail(monkeypatch, passes, "ScoredGraph", storing, allocation_error())
        assert_same(score_batches(scored, ones, STORED), expected)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "hfprune: out of memory; continuing with layers recomputed in the backward"


@WAYS
def test_what_never_fits_ends_with_one_line_and_nothing_counted(
    model: Make, how: PassOptions,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fail(monkeypatch, criteria, "linear_entropy", lambda *_, **__: True, allocation_error())
    commits, counts = [], [0.0]
    with (
        model(how) as scored,
        pytest.raises(MemoryShortageError, match="try a smaller --seq-len") as raised,
    ):
        score_batches(
            scored, sequences(4, 4, 4, 4), how,
            on_commit=lambda *commit: commits.append(commit),
            on_progress=lambda tokens: counts.append(counts[-1] + tokens),
        )  # fmt: skip
    assert "\n" not in str(raised.value)
    assert "can't allocate memory" in str(raised.value)
    assert not commits
    assert counts[-1] == pytest.approx(0, abs=1e-9)
    said = capfd.readouterr().err
    assert said.count("micro-batches of 2") == 1
    assert said.count("micro-batches of 1") == (2 if how.pass_tokens else 1)
    assert said.count("layers recomputed") == (0 if how.recompute else 1)
    assert len(said.splitlines()) == (2 if how == RECOMPUTED else 3)


def test_a_pass_whose_inputs_do_not_fit_is_made_shorter(
    model: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where smaller micro-batches alone would not help: no two fit, whatever their size."""
    how = PassOptions(recompute=True, pass_tokens=16 * TOKENS)
    held: list[int] = []
    with model(how) as scored:
        expected = score_batches(scored, sequences(*[1] * SEQUENCES), how)
        fail(
            monkeypatch, passes.Pass, "add_to",
            lambda a_pass, *_: sum(len(b.ids) for b in a_pass.batches) > 3, allocation_error(),
        )  # fmt: skip
        totals = score_batches(
            scored, sequences(4, 4, 4, 4), how,
            on_commit=lambda totals, _: held.append(totals.samples - sum(held)),
        )  # fmt: skip
    assert sum(held) == SEQUENCES
    assert 1 < max(held) <= 3
    assert_same(totals, expected)
    assert re.search("micro-batches of 1, at most [0-9]+ tokens a pass", capfd.readouterr().err)


@WAYS
@pytest.mark.parametrize("where", ["head", ("forward", LAST), ("backward", MIDDLE)], ids=str)
def test_the_failed_pass_is_freed_before_the_message(
    model: Make, how: PassOptions, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: list[int] = []
    with model(how) as scored:
        watch = Watch(*scored.model.parameters())

        def count(*_: Any, **__: Any) -> bool:
            live.append(sum(size for ref, size in watch.live if not ref.expired()))
            return len(live) == 3  # the message: what follows is another test's

        fail(monkeypatch, passes.Pass, "add_to", count, AssertionError("a third pass"))
        fail(monkeypatch, run, "say", count, AssertionError("the message"))
        fail_at(monkeypatch, where, how, allocation_error())
        gc.disable()  # a cycle would keep its tensors until the next collection
        try:
            with watch, pytest.raises(AssertionError, match="the message"):
                score_batches(scored, sequences(4, 4, 4, 4), how)
        finally:
            gc.enable()
    _, second_pass, at_message = live
    assert at_message == second_pass
