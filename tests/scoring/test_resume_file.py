"""The file that a run keeps its totals in: when it is written, and when it is refused."""

import json
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interruption import assert_whole, score_args, state_of
from paths import CPU_DEFAULT
from refusals import assert_refused
from safetensors import safe_open
from safetensors.torch import save_file
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint import atomic
from hfprune_fast.errors import ArgumentError, OutputError
from hfprune_fast.kernels import TRITON_VERSION
from hfprune_fast.scoring import passes, resume

Hfprune = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("one_thread", "small_inputs")


def test_the_state_is_written_as_often_as_requested(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [0.0], []
    add_to = passes.Pass.add_to

    def lasting_a_second(self: Any, total: Any) -> Any:
        now[0] += 1
        return add_to(self, total)

    def write(_: Path, data: bytes, __: object) -> None:
        written.append(now[0])

    monkeypatch.setattr(passes.Pass, "add_to", lasting_a_second)
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(resume, "write_whole", write)
    assert hfprune(*score_args("--save-seconds", 5)).code == 0
    assert written == [5, 10]


def test_a_leftover_state_is_resumed_or_discarded_but_never_overwritten(
    hfprune: Hfprune, interrupted: Hfprune
) -> None:
    assert hfprune(*score_args("--seed", 1, out="whole")).code == 0
    interrupted(*score_args())
    left = state_of().read_bytes()
    refused = hfprune(*score_args("--seed", 1))
    assert_refused(refused, r"has left scores\.state; --resume continues it, --force discards")
    assert len(refused.err.splitlines()) == 1
    assert state_of().read_bytes() == left
    interrupted(*score_args("--seed", 1, "--force"), at_pass=0)
    assert not state_of().exists()
    interrupted(*score_args())
    assert_whole(hfprune(*score_args("--seed", 1, "--force")))


def test_with_nothing_to_resume_it_starts_from_the_beginning(hfprune: Hfprune) -> None:
    assert hfprune(*score_args(out="whole")).code == 0
    run = hfprune(*score_args("--resume"))
    said = "hfprune: nothing to resume: there is no scores.state; starting from the beginning"
    assert said in run.err.splitlines()
    assert_whole(run)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("model", r"model_fingerprint \w{12}…, not \w{12}…"),
        ("--calibration other_ids.npy", r"data_sha256 \w{12}…, not \w{12}…"),
        ("--calibration longer.npy", "seq_len 16, not 17"),
        ("--seed 1", "seed 0, not 1"),
        ("--samples 12", "samples 20, not 12"),
        ("--dtype float64", "dtype float32, not float64"),
        ("--batch-size 3", "batch_size 2, not 3"),
        ("--parity", "parity False, not True"),
        pytest.param(
            "--backend triton",
            f"backend {CPU_DEFAULT}, not triton",
            marks=pytest.mark.skipif(TRITON_VERSION is None, reason="triton is not installed"),
        ),
    ],
)
def test_a_state_of_another_run_is_refused_by_what_differs(
    hfprune: Hfprune, interrupted: Hfprune, change: str, difference: str
) -> None:
    interrupted(*score_args("--samples", 20))
    left = state_of().read_bytes()
    model, flags = ("other_model", []) if change == "model" else ("model", change.split())
    run = hfprune(*score_args("--samples", 20, "--resume", *flags, model=model))
    assert_refused(run, rf"scores\.state is of another run: ([^;]+; )*{difference}.*; --force")
    assert "kept in" not in run.err
    assert state_of().read_bytes() == left
    assert not Path("scores").exists()


def rewritten(
    change: Callable[[Any, Any], object], *, signed: bool = True
) -> Callable[[Path], None]:
    """Change the header and tensors of a state; a string that is returned replaces the header.

    With `signed` the digest is made to fit, as an attacker would.
    """

    def rewrite(file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["hfprune_state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        instead = change(header, tensors)
        if signed and not isinstance(instead, str):
            header["digest"] = resume.digest_of(header, tensors)
        text = instead if isinstance(instead, str) else json.dumps(header)
        save_file(tensors, file, {"hfprune_state": text})

    return rewrite


def flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int64).view(-1)[0] ^= 1 << 50


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "without its tensors": lambda file: file.write_bytes(file.read_bytes()[:600]),
    "of another kind": lambda file: file.write_bytes(Path("ids.npy").read_bytes()),
    "a model": lambda file: file.write_bytes(Path("model/model.safetensors").read_bytes()),
    "no JSON": rewritten(lambda *_: "{"),
    "a list": rewritten(lambda *_: "[1]"),
    "deep": rewritten(lambda *_: "[" * 100_000),
    "of a later version": rewritten(lambda header, _: header.update(format_version=3)),
    "without identity": rewritten(lambda header, _: header.pop("identity")),
    "identity a number": rewritten(lambda header, _: header.update(identity=3)),
    "batch size a word": rewritten(lambda header, _: header["identity"].update(batch_size="x")),
    "no batch size": rewritten(lambda header, _: header["identity"].update(batch_size=0)),
    "samples a word": rewritten(lambda header, _: header.update(samples="x")),
    "samples a fraction": rewritten(lambda header, _: header.update(samples=2.5)),
    "max_batch_size is 0": rewritten(lambda header, _: header.update(max_batch_size=0)),
    "entropy is no number": rewritten(lambda header, _: header.update(loss_nats=[float("nan")])),
    "a loss is huge": rewritten(lambda header, _: header.update(loss_nats=[10**400])),
    "losses a word": rewritten(lambda header, _: header.update(loss_nats="x")),
    "a budget of 0": rewritten(lambda header, _: header["identity"].update(logits_budget_bytes=0)),
    "no digest": rewritten(lambda header, _: header.pop("digest"), signed=False),
    "a count of another run": rewritten(lambda header, _: header.update(samples=10), signed=False),
    "one bit": rewritten(lambda _, tensors: flip_a_bit(tensors["statistics"]), signed=False),
    "one bit of a norm": rewritten(
        lambda _, tensors: flip_a_bit(tensors["down_norm"]), signed=False
    ),
    "a tensor less": rewritten(lambda _, tensors: tensors.popitem()),
}


@pytest.fixture(scope="module")
def states() -> list[bytes]:
    return []


@pytest.fixture
def left(small_inputs: None, interrupted: Hfprune, states: list[bytes]) -> None:
    """The state that an interrupted run left; its bytes are the same each time."""
    if states:
        state_of().write_bytes(states[0])
    else:
        interrupted(*score_args())
        states.append(state_of().read_bytes())


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_one_line(hfprune: Hfprune, damage: str) -> None:
    DAMAGE[damage](state_of())
    left = state_of().read_bytes()
    run = hfprune(*score_args("--resume", batch_size=None))
    assert_refused(run, r"scores\.state is not what an interrupted .* left, or is damaged")
    assert len(run.err.splitlines()) <= 2  # and how many samples the ids make
    assert state_of().read_bytes() == left
    if damage in ("empty", "of another kind", "a model"):  # whose it is cannot be told
        assert_refused(hfprune(*score_args("--force")), "move it away, or choose another out")
        assert state_of().read_bytes() == left
    else:
        assert "starts again" in run.err
        assert hfprune(*score_args("--force", "--samples", 2)).code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 8, "tokens": 512}, "tokens 512, not 128"),
        ({"samples": 10**9}, "samples 1000000000, not 24"),
        ({"tokens": 10**9}, "tokens 1000000000, not"),
        ({"loss_nats": []}, "0 losses, not 1"),
        ({"loss_nats": [1.0, 2.0]}, "2 losses, not 1"),
    ],
)
@pytest.mark.usefixtures("left")
def test_counts_are_held_against_the_run(
    hfprune: Hfprune, change: dict[str, Any], message: str
) -> None:
    rewritten(lambda header, _: header.update(change))(state_of())
    assert_refused(hfprune(*score_args("--resume")), message)


def test_only_a_state_of_ours_is_replaced_or_deleted(
    hfprune: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_of().write_text("another program's optimizer")
    for flag in ("--force", "--resume", "--seed=0"):
        assert_refused(hfprune(*score_args(flag)), "move it away, or choose another out")
    state_of().unlink()
    for link in ("ids.npy", "scores.state"):  # one to another file, one to itself
        state_of().symlink_to(link)
        assert_refused(hfprune(*score_args("--force")), "scores.state")
        assert state_of().is_symlink()
        state_of().unlink()
    add_to = passes.Pass.add_to

    def while_the_user_writes(self: Any, total: Any) -> Any:
        state_of().write_text("mine")
        return add_to(self, total)

    monkeypatch.setattr(passes.Pass, "add_to", while_the_user_writes)
    run = hfprune(*score_args("--save-seconds", 0))
    assert run.code == 0
    assert "only in memory" in run.err
    assert state_of().read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("statistics", torch.zeros(4, 3, 95, dtype=torch.float64)),
        ("statistics", torch.zeros(4, 3, 96)),
        ("down_norm", torch.zeros(1, dtype=torch.float64)),
    ],
)
@pytest.mark.usefixtures("left")
def test_a_tensor_of_another_shape_or_dtype_is_named(
    hfprune: Hfprune, name: str, tensor: torch.Tensor
) -> None:
    rewritten(lambda _, tensors: tensors.update({name: tensor}))(state_of())
    shape = re.escape(f"{name} of {tuple(tensor.shape)} {tensor.dtype}")
    assert_refused(hfprune(*score_args("--resume")), shape)


def test_resuming_needs_something_to_resume(hfprune: Hfprune) -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="state_file needs the model by path"):
        hf.score(tiny_model("llama"), ids, state_file="state")
    with pytest.raises(ArgumentError, match="resume needs the state_file"):
        hf.score("model", ids, resume=True)
    run = hfprune(
        "prune", "model", "--scores", "x", "--prune-ratio", 0.2, "--out", "pruned", "--resume"
    )
    assert_refused(run, "--resume continues scoring, so with --calibration, not --scores")


def test_a_state_that_cannot_be_written_ends_nothing(
    hfprune: Hfprune, interrupted: Hfprune, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hfprune(*score_args(out="whole")).code == 0
    calls, write = count(), atomic.write_whole

    def full(file: Path, data: bytes, may_replace: Callable[[Path], bool]) -> None:
        if next(calls) > 2:
            raise OutputError(f"cannot write {file}: No space left on device")
        write(file, data, may_replace)

    monkeypatch.setattr(resume, "write_whole", full)
    run = interrupted(*score_args("--save-seconds", 0), at_pass=8)  # which stays one, exit code 130
    assert run.err.count("only in memory") == 1
    assert "hfprune: 6 of 24 sequences are saved in scores.state" in run.err
    monkeypatch.setattr(resume, "write_whole", write)
    assert_whole(hfprune(*score_args("--resume")))


def test_a_forced_run_that_is_refused_discards_nothing(
    hfprune: Hfprune, interrupted: Hfprune
) -> None:
    interrupted(*score_args())
    left = state_of().read_bytes()
    assert_refused(hfprune(*score_args("--force", "--calibration", "none.npy")), "none.npy")
    assert_refused(hfprune(*score_args("--force", "--memory-budget", "1MB")), "memory budget")
    assert state_of().read_bytes() == left
