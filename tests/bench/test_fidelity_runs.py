"""fidelity.py over interrupted sessions and further texts: what is kept, refused and timed."""

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fidelity
import fidelity_subject
import pytest
import samples
import torch
from fidelity_subject import Seed, Subject
from fidelity_tables import NEEDED, read
from fidelity_variants import DEFAULT, PAPER, QUICK, UNIFORM, Variant

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.errors import ScoresFileError

CALIBRATION, HELD_OUT = TINY_MODEL / "calibration.txt", TINY_MODEL / "heldout.txt"
Run = Callable[..., tuple[int, str]]


def windows(text: Path, samples: int, seed: int = 0) -> TokenData:
    return calibrate(text, open_source("demo"), CalibrationOptions(samples, 64, seed))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(open_source("demo"), windows(HELD_OUT, 2))


@pytest.fixture
def run(tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run fidelity.py on the shipped model and few tokens; its exit status and what it said."""

    def run(*options: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = fidelity.main(
            ["demo", "--calibration", str(CALIBRATION), "--text", str(HELD_OUT),
             "--out", str(tmp_path), "--samples", "4", "--eval-samples", "2", "--seq-len", "64",
             "--rows", "quick", "--seeds", "0", *map(str, options)]
        )  # fmt: skip
        return code, capsys.readouterr().err

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "machine" not in row]


def test_each_row_is_there_as_soon_as_it_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(self: Seed, variant: Variant, ratio: float) -> dict[str, Any]:
        asked.append((variant, ratio))
        if (variant, ratio) == (UNIFORM, 0.5):
            raise KeyboardInterrupt
        return dict.fromkeys(NEEDED, 0) | vars(variant) | {"prune_ratio": ratio}

    monkeypatch.setattr(Seed, "row", fake)
    ratios = "--ratios", 0.2, 0.5
    with pytest.raises(KeyboardInterrupt):
        run(*ratios)
    assert rows(tmp_path)[-1]["prune_ratio"] == 0.2
    assert asked[-2:] == [(UNIFORM, 0.2), (UNIFORM, 0.5)]
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run(*ratios)
    assert asked == [(UNIFORM, 0.5)], "what was there is measured again"
    asked.clear()
    assert run("--ratios", 0.3, 0.4, "--only", str(DEFAULT))[0] == 0
    assert asked == [(DEFAULT, 0.3), (DEFAULT, 0.4)]


def test_scores_are_kept_for_the_same_windows_and_model(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, at = windows(CALIBRATION, 4), tmp_path / "demo-seed0"
    first = Seed(subject, calibration, 0, at)
    scored = first.keep(PAPER, 0.3), first._parity.importance()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "demo-seed0-parity.safetensors", "demo-seed0-scores.safetensors",
    ]  # fmt: skip

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(hf, "score", refuse)
    again = Seed(subject, calibration, 0, at)
    for layer, kept in again.keep(PAPER, 0.3).items():
        assert torch.equal(kept, scored[0][layer])
    assert torch.equal(again._parity.importance(), scored[1])
    for other in (
        Seed(subject, windows(CALIBRATION, 4, seed=1), 0, at),
        Seed(subject, calibration, 1, at),
    ):
        with pytest.raises(ScoresFileError, match="has scores of other windows; give another"):
            _ = other.scores
    provenance = {**again.scores.provenance, "model_fingerprint": "another's"}
    replace(again.scores, provenance=provenance).save(f"{at}-scores.safetensors")
    with pytest.raises(ScoresFileError, match="the scores are of another model than demo"):
        _ = Seed(subject, calibration, 0, at).scores


def test_interrupted_scoring_is_resumed(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, score = Seed(subject, windows(CALIBRATION, 4), 0, tmp_path / "demo-seed0"), hf.score
    resumed = []

    def interrupted_once(*args: Any, state_file: Path, resume: bool, **options: Any) -> Any:
        resumed.append(resume)
        if not resume:
            state_file.touch()
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(hf, "score", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        _ = seed.scores
    assert seed.scores.criteria == fidelity_subject.CRITERIA
    assert resumed == [False, True]
    assert [file.name for file in tmp_path.iterdir()] == ["demo-seed0-scores.safetensors"]


def test_the_time_of_a_row_has_no_scoring_and_no_measuring(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            return function(*args, **options)

        return call

    monkeypatch.setattr(fidelity_subject.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(hf, "score", taking(1000, hf.score))
    monkeypatch.setattr(fidelity_subject, "refit", taking(8, fidelity_subject.refit))
    monkeypatch.setattr(Subject, "measure", taking(100, Subject.measure))
    seed = Seed(subject, windows(CALIBRATION, 4), 0)
    assert seed.row(UNIFORM, 0.2)["cpu_seconds"] == 8
    assert seed.row(PAPER, 0.2)["cpu_seconds"] == 0


def test_further_texts_are_measured_too(run: Run, tmp_path: Path) -> None:
    text = HELD_OUT.read_text(encoding="utf-8")
    other = tmp_path / "other.txt"
    other.write_text(text[len(text) // 2 :], encoding="utf-8")
    only = "--only", "entropy l1", "--ratios", 0.5
    assert run(*only, "--also", f"half={other}", "--generate", 0.5)[0] == 0
    (row,) = rows(tmp_path)
    assert row["also"]["half"].keys() < row.keys()
    subject = Subject(open_source("demo"), windows(HELD_OUT, 2))
    seed = Seed(subject, windows(CALIBRATION, 4), 0)
    smaller = subject.pruned(seed.prune(PAPER, 0.5))
    want = hf.evaluate(subject.model, smaller, windows(other, 2).batches[0].ids)
    found = row["also"]["half"]
    assert found["kl_nats"] == pytest.approx(want.kl_nats, rel=1e-4)
    assert found["ppl_pruned"] == pytest.approx(want.ppl_pruned, rel=1e-4)
    assert row["generated"]["prompts"] == 2

    code, said = run(*only, "--also", f"same={CALIBRATION}")
    assert (code, said.count("\n")) == (2, 1)
    assert "is the calibration text" in said
    other.write_text(text[: len(text) // 2], encoding="utf-8")
    code, said = run(*only, "--also", f"half={other}")
    assert "has other windows of its text 'half'; give another --out" in said
    # Rows of fewer texts may be added, and then of more.
    assert run("--only", "fisher l2", "--ratios", 0.5)[0] == 0
    assert "also" not in rows(tmp_path)[1]
    assert read(tmp_path / "demo.jsonl").also == {"half": "other.txt"}


def test_only_some_rows_by_their_names(run: Run) -> None:
    for of in (*fidelity.ROWS.values(), *fidelity.ROWS_OF_MIXTURES.values()):
        assert len({str(variant) for variant in of}) == len(of)
    code, said = run("--only", "fisher")
    assert code == 2
    assert said.startswith("fidelity.py: --only 'fisher' is not one of --rows quick: entropy l1; ")
    assert said.count(";") == len(QUICK) - 1


def test_make_evidence_asks_for_rows_that_there_are() -> None:
    root = Path(__file__).parents[2]
    command = ["make", "-n", "evidence", "TEXT=one.txt", "HELD_OUT=other.txt"]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    lines = said.replace("\\\n", " ").splitlines()
    studies = [shlex.split(line)[1:] for line in lines if "bench/fidelity/" in line]
    assert len(studies) == 5
    for script, *options in studies:
        if Path(script).name == "fidelity.py":
            args = fidelity.parsed(options)
            assert {*(args.only or ())} <= {str(each) for each in fidelity.ROWS[args.rows]}
        else:
            samples.parsed(options)
