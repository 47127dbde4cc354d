"""The rows of bench/results/recovery, and the tables and tasks of bench/recovery."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import recovery
import recovery_tables
import report
from invented_results import write_pages
from local_tasks import NAMES, write_tasks
from records import ROOT

MODELS = recovery_tables.all_of(ROOT)


@pytest.mark.parametrize("name", MODELS)
def test_recovery_never_raised_kl(name: str) -> None:
    pruned = {row["ratio"]: row["kl_nats"] for row in MODELS[name] if row["way"] == "pruned"}
    for row in MODELS[name]:
        if row["way"] in ("kl", "reconstructed"):
            assert row["kl_nats"] < pruned[row["ratio"]], row["way"]


def test_the_page_has_every_row_and_an_edit_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"task": "own", "metric": "acc", "dense": 0.5, "dense_stderr": 0.03, "pruned": 0.4,
            "pruned_stderr": 0.03, "difference": -0.1, "difference_stderr": 0.02}  # fmt: skip
    row = {"ratio": 0.2, "way": "kl", "tokens": 100_000, "cpu_seconds": 90.0, "peak_bytes": 2.5e9,
           "kl_nats": 0.0213, "held_out_tokens": 4096, "ppl_dense": 10.0, "ppl_pruned": 10.25,
           "top1_agreement": 0.912, "tasks": [task]}  # fmt: skip
    pruned = row | {"way": "pruned", "tokens": 0, "tasks": [task | {"difference": -0.2}]}
    results = tmp_path / "bench" / "results" / "recovery"
    results.mkdir(parents=True)
    (results / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, pruned)))
    write_pages(tmp_path)
    page = shutil.copy(ROOT / "docs" / "recovery.md", tmp_path / "docs")
    report.write(tmp_path)
    (results / "recovery.svg").write_text("<svg/>")
    text = Path(page).read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    way = "recovered by KL, 0.1 M tokens"
    assert ["20%", way, "0.0213", "10.25", "91.2%", "90.0 s", "2.50 GB"] in lines
    assert lines.index(["20%", "pruned", "-0.200 ± 0.020"]) < lines.index(
        ["20%", way, "-0.100 ± 0.020"]
    )
    assert ["", "dense", "0.500 ± 0.030"] in lines
    assert not list(report.disagreements(tmp_path))
    Path(page).write_text(text.replace("0.0213", "0.0211"), encoding="utf-8")
    (line,) = report.disagreements(tmp_path)
    assert line.startswith("docs/recovery.md: line ")


def test_tasks_of_a_text_are_right_and_the_same_each_time(tmp_path: Path) -> None:
    sentences = [f"number {i} is {' '.join(f'w{i}x{k}' for k in range(12))} end" for i in range(40)]
    text = "\n".join(f"{s}. {s}. {s} {i:03}." for i, s in enumerate(sentences))
    for folder in ("first", "again"):
        write_tasks(text, tmp_path / folder, 10)
    read: dict[str, list[dict[str, Any]]] = {}
    for name in NAMES:
        data = (tmp_path / "first" / f"{name}.jsonl").read_text()
        assert data == (tmp_path / "again" / f"{name}.jsonl").read_text()
        read[name] = [json.loads(line) for line in data.splitlines()]
        assert len(read[name]) == 10
    for asked in read["continuation"]:
        right = asked["choices"][asked["answer"]]
        assert f"{asked['context']} {right}" in text
        assert len(set(asked["choices"])) == 4
    for asked in read["last_word"]:
        assert f"{asked['context']} {asked['word']}." in text
    with pytest.raises(SystemExit, match="40 passages, not 41 of each"):
        write_tasks(text, tmp_path / "more", 41)
    with pytest.raises(SystemExit, match="of 4 documents or more, got 3"):
        write_tasks(text, tmp_path / "few", 3)


def test_other_settings_and_too_short_a_text_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("It ends soon. " * 200, encoding="utf-8")
    ran: list[Any] = []

    def measured(job: recovery.Job, ways: Any, out: Path) -> None:
        ran.append(ways)
        row = {"ratio": job.ratio, "settings": recovery.settings(job.arguments)}
        out.write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(recovery, "RESULTS", tmp_path)
    monkeypatch.setattr(recovery, "run", measured)

    def main(name: str, *options: str) -> None:
        words = ["recovery.py", "--model", "demo", "--text", "demo", "--held-out", str(short)]
        words += ["--ratio", "0.2", "--work", str(tmp_path / name), "--name", name]
        monkeypatch.setattr("sys.argv", [*words, "--seq-len", "64", *options])
        recovery.main()

    main("first")
    assert ran == [[("pruned", 0), ("reconstructed", 0), *((w, n) for n in (100_000, 500_000)
                    for w in ("kl", "ce"))]]  # fmt: skip
    ran.clear()
    refused = r"first is of --seq-len 64, not 32; give another --name and --work"
    with pytest.raises(SystemExit, match=refused):
        main("first", "--seq-len", "32")
    (tmp_path / "first" / "settings.json").unlink()
    with pytest.raises(SystemExit, match=r"first\.jsonl is of --seq-len 64, not 32"):
        main("first", "--seq-len", "32")
    with pytest.raises(SystemExit, match=r"of --held-out-samples None, not 3"):
        main("first", "--held-out-samples", "3", "--seq-len", "64")
    with pytest.raises(SystemExit, match=r"the text has .* not 50 of each"):
        main("second", "--tasks", "50")
    with pytest.raises(SystemExit):
        main("third", "--way", "pruend")
    assert "invalid choice: 'pruend'" in capsys.readouterr().err
    assert not ran
