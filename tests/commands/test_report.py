"""hfprune prune --text --report and hfprune report: the same numbers everywhere, one page."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.commands import evaluate, report

Hfprune = Callable[..., Any]
SAMPLING: dict[str, Any] = {"samples": 8, "seq_len": 48}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scores, a held-out text, a pruned model, and the report of its pruning."""
    place = tmp_path_factory.mktemp("report")
    words = (TINY_MODEL / "heldout.txt").read_text(encoding="utf-8")[:1200]
    (place / "held <out>.txt").write_text(f"{words} <script>alert(1)</script> " * 2)
    table = hf.score("demo", "demo", criterion=["fisher"], obs=True, **SAMPLING)
    table.save(place / "scores")
    result = hf.oneshot(
        "demo", "demo", place / "out", scores=table, prune_ratio=0.3,
        text=place / "held <out>.txt", report=place / "run.html", **SAMPLING,
    )  # fmt: skip
    (place / "result.json").write_text(json.dumps(result))
    return place


def test_all_say_the_same(place: Path) -> None:
    record = json.loads((place / "out" / "hfprune.json").read_text())
    result = json.loads((place / "result.json").read_text())
    page = (place / "run.html").read_text(encoding="utf-8")
    found = evaluate.run("demo", place / "out", place / "held <out>.txt", samples=None, seq_len=48)
    assert result["fidelity"] == found
    fidelity = record["fidelity"]
    assert {name: fidelity[name] for name in found} == found
    bins = fidelity["kl_nats_by_position"]
    total = sum(kl * tokens for _, _, kl, tokens in bins)
    assert total == pytest.approx(found["kl_nats"] * found["tokens"], rel=1e-9)
    for said in (
        f"{found['kl_nats']:.4f}", f"{found['ppl_dense']:.3f}", f"{found['ppl_pruned']:.3f}",
        f"{record['achieved']['params']:,}", f"{record['achieved']['prune_ratio']:.2%}",
        *(f"{kl:.4f}" for kl in record["chosen"]["allocations_kl_nats"].values()),
        "held &lt;out&gt;.txt", "What changed most", "Time and memory", "measuring",
    ):  # fmt: skip
        assert said in page, said
    assert "<script" not in page
    assert "not shown" not in page
    card = ModelCard.load(place / "out" / "README.md")
    metrics = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == found["ppl_pruned"]
    assert sorted(record["files"]) == sorted(p.name for p in (place / "out").iterdir())


def test_of_a_folder(place: Path, tmp_path: Path, hfprune: Hfprune) -> None:
    """What is recorded; with the scores and both models as much as the run itself showed."""
    page, again = tmp_path / "a.html", tmp_path / "b.html"
    assert hfprune("report", place / "out", "--out", page).code == 0
    alone = page.read_text(encoding="utf-8")
    assert "Fidelity" in alone
    assert "Importance and the cut" not in alone
    assert "not shown: importance curves" in alone
    more = [
        "--scores", place / "scores", "--dense", "demo", "--text", place / "held <out>.txt",
        "--seq-len", 48,
    ]  # fmt: skip
    for out in (page, again):
        done = hfprune("report", place / "out", "--out", out, *more, "--force", "--json")
        assert done.code == 0, done.err
    assert page.read_bytes() == again.read_bytes()
    whole = page.read_text(encoding="utf-8")
    run = (place / "run.html").read_text(encoding="utf-8")
    assert whole[whole.index("<h2>Widths") : whole.index("<h2>How to load it")] in run
    recorded = json.loads((place / "out" / "hfprune.json").read_text())["fidelity"]["kl_nats"]
    assert done.json()["fidelity"]["kl_nats"] == recorded


def test_an_export_keeps_its_measurement(place: Path, tmp_path: Path, hfprune: Hfprune) -> None:
    out = tmp_path / "padded"
    assert hfprune("export", place / "out", "--to", "padded", "--out", out).code == 0
    done = hfprune(
        "report", out, "--out", tmp_path / "r.html", "--scores", place / "scores", "--json"
    )
    assert done.code == 0, done.err
    recorded = json.loads((place / "out" / "hfprune.json").read_text())["fidelity"]
    assert done.json()["fidelity"]["ppl_pruned"] == recorded["ppl_pruned"]
    assert "padded with zero neurons" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_keep_of_ones_own(llama_dir: Path, tmp_path: Path, hfprune: Hfprune) -> None:
    import torch

    keep = {layer: torch.arange(0, 96, 2) for layer in range(3)}
    hf.prune_checkpoint(llama_dir, tmp_path / "out", keep)
    done = hfprune("report", tmp_path / "out", "--out", tmp_path / "r.html")
    assert done.code == 0, done.err
    assert "48 of 96" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["demo"], "has no hfprune.json; expected the folder of a model that hfprune has pruned"),
        (["OUT", "--text", "demo"], "--dense MODEL and --text SOURCE go together"),
        (["OUT", "--dense", "demo"], "--dense MODEL and --text SOURCE go together"),
        (["OUT", "--scores", "nowhere"], "no scores file nowhere"),
        (["OUT", "--scores", "OTHER"], "these scores are not the ones this model was pruned with"),
        (["OUT", "--out", "OUT/report.html"], "which is never written to"),
        (["OUT", "--out", "MINE", "--force"], "is not an hfprune report; --force replaces only"),
        (["OUT", "--out", "MINE"], "report mine.html exists; --force replaces an hfprune report"),
        (["DAMAGED"], "damaged/hfprune.json is damaged"),
        (["OUT", "--dense", "demo", "--text", "nowhere.txt"], "no file"),
        (["OUT", "--dense", "OUT", "--text", "demo"], "was made of a model of 1,049,728 param"),
    ],
)  # fmt: skip
def test_mistakes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hfprune: Hfprune,
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("my own")
    if "OTHER" in flags:
        options: dict[str, Any] = {"criterion": ["fisher"], "obs": True, "samples": 4}
        hf.score("demo", "demo", seed=3, seq_len=32, **options).save(tmp_path / "other")
    if "DAMAGED" in flags:
        shutil.copytree(place / "out", tmp_path / "damaged")
        record = json.loads((place / "out" / "hfprune.json").read_text())
        record["achieved"]["params"] = "<script>"
        (tmp_path / "damaged" / "hfprune.json").write_text(json.dumps(record))
    names = {"OUT": str(place / "out"), "MINE": "mine.html", "OTHER": "other", "DAMAGED": "damaged"}
    given = [names.get(f, f.replace("OUT/", f"{place / 'out'}/")) for f in flags]
    done = hfprune("report", *given)
    assert done.code == 2, done.err
    assert message in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert (tmp_path / "mine.html").read_text() == "my own"
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("field", "value", "flags", "message"),
    [
        ("provenance", {"versions": 1}, [], "damaged/hfprune.json is damaged"),
        ("recovery", {}, [], "damaged/hfprune.json is damaged"),
        ("requested", {"select": "l", "criterion": "fisher", "statistic": "l1", "refit": "none"},
         ["--scores", "SCORES"], "these scores are not the ones this model was pruned with"),
    ],
)  # fmt: skip
def test_nothing_is_measured_for_a_report_that_cannot_be_written(
    field: str, value: Any, flags: list[str], message: str, place: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, hfprune: Hfprune,
) -> None:  # fmt: skip
    monkeypatch.setattr(report, "measure", lambda *_: pytest.fail("it was measured"))
    shutil.copytree(place / "out", tmp_path / "damaged")
    record = json.loads((place / "out" / "hfprune.json").read_text())
    (tmp_path / "damaged" / "hfprune.json").write_text(json.dumps(record | {field: value}))
    given = [str(place / "scores") if flag == "SCORES" else flag for flag in flags]
    compared = ["--dense", "demo", "--text", "demo", "--out", tmp_path / "report.html"]
    done = hfprune("report", tmp_path / "damaged", *given, *compared)
    assert done.code == 2, done.err
    assert message in done.err.splitlines()[-1]


@pytest.mark.parametrize("command", ["prune", "report"])
def test_a_missing_matplotlib_is_said_before_the_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hfprune: Hfprune, command: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(
        "hfprune_fast.pruning.oneshot.open_job", lambda *_, **__: pytest.fail("worked")
    )
    page = tmp_path / "r.html"
    arguments = {
        "prune": ["prune", "demo", "--calibration", "demo", "--prune-ratio", 0.2, "--out",
                  tmp_path / "out", "--report", page],
        "report": ["report", place / "out", "--out", page],
    }[command]  # fmt: skip
    done = hfprune(*arguments)
    assert done.code == 2
    assert "pip install 'hfprune_fast[report]'" in done.err.splitlines()[-1]
    assert not page.exists()
    assert not (tmp_path / "out").exists()


def test_refusals_of_prune_come_before_the_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hfprune: Hfprune
) -> None:
    monkeypatch.setattr(
        "hfprune_fast.pruning.oneshot.open_job", lambda *_, **__: pytest.fail("worked")
    )
    out = tmp_path / "new" / "out"
    (tmp_path / "short.txt").write_text("A few words.")
    for flags, message in (
        (["--report", out / "r.html"], "is inside or is above out"),
        (["--report", tmp_path / "new"], "is inside or is above out"),
        (["--report", place / "scores", "--force"], "is not an hfprune report"),
        (["--report", TINY_MODEL / "r.html"], "never written to"),
        (["--text", tmp_path / "nowhere.txt"], "no file"),
        (["--text", tmp_path / "short.txt"], "give more text or a smaller --seq-len"),
    ):
        done = hfprune(
            "prune", "demo", "--calibration", "demo", "--prune-ratio", 0.2, "--out", out, *flags
        )
        assert done.code == 2, done.err
        assert message in done.err.splitlines()[-1]
    assert not out.exists()


def test_a_source_card_is_read_once(
    llama_dir: Path, tmp_path: Path, text_file: Path, hfprune: Hfprune
) -> None:
    """The card is written again with the measurement; one that cannot be read is said once."""
    (llama_dir / "README.md").write_text("---\nlicense: mit\n")
    done = hfprune(
        "prune", llama_dir, "--criterion", "magnitude", "--prune-ratio", 0.2, "--out",
        tmp_path / "out", "--text", text_file, "--seq-len", 32,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err.count("README.md is ignored") == 1


def test_the_checkpoint_stays_when_the_measurement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hfprune: Hfprune
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("too much")

    monkeypatch.setattr("hfprune_fast.pruning.after.measure", fail)
    out = tmp_path / "out"
    done = hfprune(
        "prune", "demo", "--criterion", "magnitude", "--prune-ratio", 0.2, "--out", out,
        "--text", "demo",
    )  # fmt: skip
    assert done.code == 2
    assert f"{out} is complete; measuring it or writing its report failed" in done.err
    assert (out / "hfprune.json").is_file()
