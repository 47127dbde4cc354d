"""bench/fidelity: what is measured, and what a rerun goes on from."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fidelity
import pytest
import torch
from fidelity_subject import Pruning, Seed, Subject
from fidelity_tables import NEEDED
from fidelity_variants import DEFAULT, PAPER, QUICK, RANDOM, ROUNDED, UNIFORM, Variant, variant_of
from invented_fidelity import invented, write

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.pruning import allocation

CALIBRATION, HELD_OUT = TINY_MODEL / "calibration.txt", TINY_MODEL / "heldout.txt"


SEQ_LEN, SAMPLES = 64, 8


def windows(text: Path, samples: int) -> TokenData:
    return calibrate(text, open_source("demo"), CalibrationOptions(samples, SEQ_LEN))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(open_source("demo"), windows(HELD_OUT, 4))


@pytest.fixture(scope="module")
def seed(subject: Subject) -> Seed:
    return Seed(subject, windows(CALIBRATION, SAMPLES), 0)


@pytest.fixture
def measure(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run fidelity.py on the shipped model and few tokens; its exit status and what it said."""

    def run(*options: Any, text: Path = HELD_OUT, calibration: Path = CALIBRATION) -> Any:
        capsys.readouterr()
        code = fidelity.main(
            ["demo", "--calibration", str(calibration), "--text", str(text), "--out", str(tmp_path),
             "--samples", str(SAMPLES), "--eval-samples", "4", "--seq-len", str(SEQ_LEN),
             "--rows", "quick", *map(str, options)]
        )  # fmt: skip
        return code, capsys.readouterr().err

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "demo.jsonl").read_text().splitlines()]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "cpu_seconds"}


def test_what_is_measured_is_what_the_default_recipe_writes(
    subject: Subject, seed: Seed, tmp_path: Path
) -> None:
    row = seed.row(DEFAULT, 0.4)
    options: dict[str, Any] = {
        "round_to": 1,
        "samples": SAMPLES,
        "seq_len": SEQ_LEN,
        "dtype": "float32",
        "device": "cpu",
    }
    done = hf.oneshot("demo", CALIBRATION, tmp_path / "out", intermediate_size=230, **options)
    pruned = load_model(tmp_path / "out", dtype="float32", device="cpu")
    want = hf.evaluate(subject.model, pruned, windows(HELD_OUT, 4).batches[0].ids)
    # The refitted weights are written in bf16, whose rounding moves a KL by some thousandths.
    assert row["kl_nats"] == pytest.approx(want.kl_nats, rel=0.02)
    assert row["tokens"] == want.tokens == 4 * SEQ_LEN
    assert row["widths"] == done.get("mlp_widths", [done["intermediate_size"]] * 4)
    assert row["param_ratio"] == pytest.approx(done["param_ratio"], rel=1e-12)
    everything = {layer: torch.arange(384) for layer in range(4)}
    dense = subject.measure(subject.pruned(Pruning(everything)), 0.0)
    assert (dense["kl_nats"], dense["top1_agreement"]) == (0, 1), "the dense model is another now"


def test_each_variant_ranks_by_its_own_scores(seed: Seed) -> None:
    """No two keep the same, but what `auto` chose from."""
    plain = (each for each in fidelity.VARIANTS if not each.refit and not each.correction)
    ranked = [each for each in plain if each.allocation == "uniform"]
    kept = {tuple(torch.cat(list(seed.keep(each, 0.3).values())).tolist()) for each in ranked}
    assert len(kept) == len(ranked) > 10


@pytest.mark.parametrize("best", [0, 1])
def test_auto_keeps_what_is_closest(seed: Seed, best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "held_out_kl", lambda *_: [float(i != best) for i in range(2)])
    as_itself = Variant("fisher", "obs", ("uniform", "measured")[best], refit=True)
    one, other = seed.row(as_itself, 0.3), seed.row(DEFAULT, 0.3)
    assert {**untimed(one), "allocation": "auto"} == untimed(other)
    assert sum(one["widths"]) == 4 * round(0.7 * 384)


def test_rounded_widths_are_those_of_round_to_auto(
    seed: Seed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "held_out_kl", lambda *_: [1.0, 0.0])  # measured
    exact, rounded = (
        [len(kept) for kept in seed.keep(each, 0.3).values()] for each in (DEFAULT, ROUNDED)
    )
    assert {width % 32 for width in rounded} == {0} != {width % 32 for width in exact}
    assert len({*rounded}) > 1
    assert abs(sum(rounded) - sum(exact)) <= 16 + 4  # half a step, and a neuron of a layer


def test_rows_of_older_files_are_read() -> None:
    row = {"criterion": "fisher", "statistic": "mask", "seed": 0}
    assert variant_of(row) == Variant("fisher", "fisher_mask")
    assert variant_of({**row, "refit": True}).correction == ""


@pytest.mark.slow
def test_rows_of_a_run_and_what_a_rerun_adds(
    measure: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, said = measure("--seeds", 0, "--ratios", 0.2, 0.5)
    assert code == 0, said
    assert said.count(" min to go\n") == 2 * len(QUICK)
    assert "demo 2/10: seed 0, entropy l1, 50% in " in said
    header, *rows = found = lines(tmp_path)
    assert header["model"] == "demo"
    assert header["params"] == 1_049_728
    kl = {(variant_of(row), row["prune_ratio"]): row["kl_nats"] for row in rows}
    assert list(kl) == [(variant, ratio) for variant in QUICK for ratio in (0.2, 0.5)]
    assert all(kl[variant, 0.5] > kl[variant, 0.2] > 0 for variant in QUICK)
    assert kl[UNIFORM, 0.5] < kl[PAPER, 0.5] < kl[RANDOM, 0.5]

    assert measure("--seeds", 0, "--ratios", 0.2, 0.5) == (0, "")
    assert lines(tmp_path) == found, "what is measured is measured again"

    # Interrupted after the fourth row: the others come again, with the same numbers.
    file = tmp_path / "demo.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    assert measure("--seeds", 0, "--ratios", 0.2, 0.5)[0] == 0
    again = lines(tmp_path)
    assert again[:5] == found[:5]
    assert again[5]["machine"] == header["machine"], "the second run says nothing of itself"
    assert list(map(untimed, again[6:])) == list(map(untimed, found[5:]))


def test_one_text_for_both_is_refused(
    measure: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    copied, part = tmp_path / "copied.txt", tmp_path / "part.txt"
    copied.write_bytes(CALIBRATION.read_bytes())
    text = CALIBRATION.read_text(encoding="utf-8")
    part.write_text(text[: len(text) // 3], encoding="utf-8")
    for same in (CALIBRATION, copied):
        code, said = measure(text=same)
        assert (code, said.count("\n")) == (2, 1)
        assert said == (
            f"fidelity.py: text {same} is the calibration text; give one of other documents\n"
        )
    code, said = measure("--samples", 500, text=part)
    assert code == 2
    of = re.escape(f"held-out windows of {part} have 48 tokens in a row in common")
    assert re.search(rf"[1-4] of 4 {of}", said)
    assert not (tmp_path / "demo.jsonl").exists()


def test_other_settings_are_refused(
    measure: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    write(tmp_path / "demo.jsonl", invented("demo", {}))
    code, said = measure("--seeds", 0)
    assert (code, said.count("\n")) == (2, 1)
    assert re.search(r"demo\.jsonl has params 1000000, not 1049728; give another --out", said)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(what, marks=() if what == "weights" else pytest.mark.slow)
        for what in ("weights", "text", "calibration", "further text")
    ],
)
def test_what_has_the_same_name_and_size_only_is_refused(
    measure: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:  # fmt: skip
    (tmp_path / "texts").mkdir()
    files = {
        name: tmp_path / "texts" / name for name in ("heldout.txt", "calibration.txt", "c.txt")
    }
    held_out, calibration = (p.read_text(encoding="utf-8") for p in (HELD_OUT, CALIBRATION))
    for file, text in zip(files.values(), (held_out, calibration, held_out[9000:]), strict=True):
        file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(fidelity, "Subject", lambda *_: None)

    def row(own: Seed, variant: Variant, ratio: float) -> dict[str, Any]:
        of = {**vars(variant), "prune_ratio": ratio, "seed": own.seed}
        return dict.fromkeys(NEEDED, 0) | of

    monkeypatch.setattr(Seed, "row", row)

    def again(*seeds: int) -> tuple[int, str]:
        also = f"c={files['c.txt']}"
        return measure(
            "--seeds", *seeds, "--ratios", 0.2, "--only", str(PAPER), "--also", also,
            text=files["heldout.txt"], calibration=files["calibration.txt"],
        )  # fmt: skip

    assert again(3)[0] == again(5, 0)[0] == 0
    if changed == "weights":
        monkeypatch.setattr(ModelSource, "fingerprint", "0123456789abcdef")
    else:
        name = {"text": "heldout.txt", "calibration": "calibration.txt"}.get(changed, "c.txt")
        own = files[name].read_text(encoding="utf-8")
        files[name].write_text(own[1000:], encoding="utf-8")
    code, said = again(7)
    what = {
        "weights": "weights .*, not .*", "text": "other windows of its held-out text",
        "calibration": "other windows of its calibration text",
        "further text": "other windows of its text 'c'",
    }[changed]  # fmt: skip
    assert (code, said.count("\n")) == (2, 1)
    assert re.search(rf"demo\.jsonl has {what}; give another --out", said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generate", 20], "--generate 20.0 is not one of the ratios"),
        (["--also", "a=x", "a=y"], "--also has a twice"),
        (["--seeds", 1, 0, 1], "--seeds has 1 twice"),
        (["--work", __file__], "File exists: "),
    ],
)
def test_options_that_would_do_nothing_or_twice_are_refused(
    measure: Callable[..., tuple[int, str]], options: list[Any], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    try:
        code, said = measure(*options, "--ratios", 0.2, "--only", str(PAPER))
    except SystemExit as error:  # argparse's
        code, said = error.code, capsys.readouterr().err
    assert code == 2
    assert message in said
