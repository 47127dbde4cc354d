"""bench/fidelity: what is measured, what a rerun goes on from, and what is shown of it."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import fidelity
import fidelity_tables
import pictures
import pytest
import report
import torch
from fidelity_subject import Pruning, Seed, Subject
from fidelity_tables import NEEDED
from fidelity_variants import DEFAULT, PAPER, QUICK, RANDOM, UNIFORM, Variant, variant_of
from invented_results import cells

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
    (row,) = seed.rows(DEFAULT, [0.4])
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


@pytest.mark.parametrize("best", [0, 2])
def test_auto_keeps_what_is_closest(seed: Seed, best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "held_out_kl", lambda *_: [float(i != best) for i in range(3)])
    as_itself = Variant("fisher", "obs", {0: "uniform", 2: "global"}[best], refit=True)
    (one,), (other,) = seed.rows(as_itself, [0.3]), seed.rows(DEFAULT, [0.3])
    assert {**untimed(one), "allocation": "auto"} == untimed(other)
    assert sum(one["widths"]) == 4 * round(0.7 * 384)


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
    monkeypatch.setattr(Seed, "rows", lambda *_: [dict.fromkeys(NEEDED, 0) | vars(PAPER)])

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
    what = "weights" if changed == "weights" else "windows"
    assert (code, said.count("\n")) == (2, 1)
    assert re.search(rf"demo\.jsonl has {what} .*, not .*; give another --out", said)


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


KL = {
    PAPER: {0.2: (0.10, 0.12, 0.20), 0.5: (1.0, 1.1, 1.2)},
    RANDOM: {0.2: (0.3, 0.3, 0.3), 0.5: (3.0, 3.3, 3.6)},
    UNIFORM: {0.2: (0.05, 0.03, 0.04), 0.5: (0.25, 0.55, 0.6)},
    DEFAULT: {0.2: (0.02, 0.024, 0.04), 0.5: (0.2, 0.22, 0.24)},
}


def invented(
    name: str, kl: dict[Variant, dict[float, tuple[float, ...]]], params: int = 1_000_000
) -> list[dict[str, Any]]:
    header = {
        "model": name, "model_type": "llama", "params": params,
        "calibration": {"samples": 8, "seq_len": 64}, "evaluation": {"samples": 4, "seq_len": 64},
        "texts": ["one.txt", "other.txt"], "date": "2030-01-02T15:00:00+00:00",
        "machine": {"name": "inventa-9", "device": "cpu", "processor": "Inventa 9", "cores": 2},
        "versions": {"torch": "2.13.0"}, "commit": "0123456789abcdef", "uncommitted_changes": False,
    }  # fmt: skip
    rows = [
        {
            **vars(variant), "prune_ratio": ratio, "seed": seed, "widths": [10, 12],
            "param_ratio": ratio / 2, "kl_nats": value, "ppl_dense": 30.0,
            "ppl_pruned": 30 + value, "top1_agreement": 1 - value / 10, "tokens": 256,
        }
        for variant, of in kl.items()
        for ratio, values in of.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    return [header, *rows]


def write(path: Path, told: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in told), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with the results of two models, of which the smaller sorts last by name."""
    folder = tmp_path / "bench/results/fidelity"
    write(folder / "small.jsonl", invented("small", KL))
    double = {
        variant: {ratio: tuple(2 * v for v in values) for ratio, values in of.items()}
        for variant, of in KL.items()
    }
    write(folder / "large.jsonl", invented("large", double, 8_000_000))
    (folder / "fidelity.svg").write_text("<svg/>")
    report.write(tmp_path)
    return tmp_path


def test_tables_have_the_numbers_of_the_rows(root: Path) -> None:
    text = (root / "bench/results/fidelity/small.md").read_text(encoding="utf-8")
    ratio, nats, perplexity, agreement = text.split("\n## ")[1:]
    # Of each seed first, then their mean: 0.02/0.1, 0.024/0.12, 0.04/0.2 are all 0.2.
    assert cells(ratio, "fisher", "obs", "auto", "yes") == ["0.200", "0.200"]
    parts = [0.05 / 0.10, 0.03 / 0.12, 0.04 / 0.20]
    assert cells(ratio, "fisher", "obs", "uniform", "yes")[0] == (
        f"{mean(parts):.3f} (0.200–0.500)"
    )
    assert cells(nats, "entropy", "l1", "uniform", "")[0] == "0.140 (0.100–0.200)"
    assert cells(perplexity, "entropy", "l1", "uniform", "")[0] == "30.14 (30.10–30.20)"
    assert cells(agreement, "entropy", "l1", "uniform", "")[0] == "0.986 (0.980–0.990)"
    assert "20%: 10.00%; 50%: 25.00%" in text
    assert "2030-01-02, commit 0123456789" in text
    assert "8 windows of 64 tokens of one.txt, drawn with seeds 0, 1, 2" in text

    page = (root / "docs/benchmarks.md").read_text(encoding="utf-8").split("## Fidelity")[1]
    head = cells(page, "criterion", "statistic", "allocation", "refit")
    assert head == [f"{name}, {ratio}%" for name in ("small", "large") for ratio in (20, 30, 50)]
    # Twice the KL of both is the same part; 30 % was not measured.
    row = ["0.32", "", f"{mean([0.25 / 1.0, 0.55 / 1.1, 0.6 / 1.2]):.2f}"]
    assert cells(page, "fisher", "obs", "uniform", "yes") == row * 2
    links = re.findall(r"\]\((.+?)\)", page)
    assert len(links) == 3
    assert all((root / "docs" / link).exists() for link in links)


def test_fields_that_older_files_do_not_have_are_shown(root: Path) -> None:
    folder = root / "bench/results/fidelity"
    old = (folder / "small.md").read_text(encoding="utf-8")
    header, *rows = invented("new", KL, 2_000_000)
    for row in rows:
        of_code = {"kl_nats": 3 * row["kl_nats"], "ppl_dense": 40.0, "ppl_pruned": 50.0}
        row |= {"top5_agreement": 0.99, "cpu_seconds": 12.5, "also": {"code": of_code}}
        if row["prune_ratio"] == 0.5:
            row["generated"] = {
                "prompts": 64, "prompt_tokens": 32, "new_tokens": 16, "common_prefix": 3.25,
                "equal_tokens": 0.125,
            }  # fmt: skip
    write(folder / "new.jsonl", [header | {"also": {"code": "code.jsonl"}}, *rows])
    report.write(root)
    assert (folder / "small.md").read_text(encoding="utf-8") == old
    text = (folder / "new.md").read_text(encoding="utf-8")
    titles = [part.partition("\n")[0] for part in text.split("\n## ")[1:]]
    assert titles[:4] == [part.partition("\n")[0] for part in old.split("\n## ")[1:]]
    assert titles[4:] == [
        "Top-5 agreement",
        "KL on code.jsonl, nats",
        "Perplexity on code.jsonl, where the dense model's is 40.00",
        "Greedy continuations: tokens before the first that is not the dense model's, of 16, after "
        "64 prompts of 32 tokens",
        "Greedy continuations: share of tokens that are the dense model's",
        "CPU seconds to choose and refit, without scoring",
    ]
    found = [cells(part, "entropy", "l1", "uniform", "") for part in text.split("\n## ")[5:]]
    assert found == [
        ["0.990"] * 2, ["0.420 (0.300–0.600)", "3.30 (3.00–3.60)"], ["50.00"] * 2,
        ["", "3.2"], ["", "0.125"], ["12.5"] * 2,
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    models = fidelity_tables.all_of(root)
    pictures.save(pictures.Picture("", partial(pictures.fidelity, models)), root / "drawn.svg")
    drawn = (root / "drawn.svg").read_text(encoding="utf-8")
    assert drawn.count("% of all parameters removed") == 4
    assert "new, code" in drawn


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("{", "no result of fidelity.py: "),
        ("[]\n", "no header"),
        (json.dumps(invented("x", KL)[1]), "no header"),
        ("\n".join(map(json.dumps, [invented("x", {})[0], {"seed": 0}])), "a row has no criterion"),
    ],
)
def test_no_result_file(
    root: Path, told: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "bench/results/fidelity/x.jsonl").write_text(told)
    capsys.readouterr()
    assert report.main([], root) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1
