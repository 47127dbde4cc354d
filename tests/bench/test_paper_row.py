"""The command of docs/reproduce.md: what it runs, what it does not run again, and its table."""

import json
from pathlib import Path
from typing import Any

import click
import paper_row
import pytest

from hfprune_fast.cli import cli

ROWS = [
    {"task": "piqa", "metric": "acc", "dense": 0.5, "pruned": 0.4},
    {"task": "piqa", "metric": "acc_norm", "dense": 0.75, "pruned": 0.5},
    {"task": "boolq", "metric": "acc", "dense": 0.625, "pruned": 0.25},
    {"task": "wikitext", "metric": "word_perplexity", "dense": 9.0, "pruned": 11.0},
]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The commands that were run, as the command line reads them; none is carried out."""
    seen: list[dict[str, Any]] = []

    def run(*words: Any) -> dict[str, Any]:
        name, *rest = map(str, words)
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        parameters = command.make_context(name, rest).params
        seen.append({"command": name, **parameters})
        if parameters.get("out"):
            Path(parameters["out"]).mkdir()
        return {"tasks": ROWS}

    monkeypatch.setattr(paper_row, "run", run)
    return seen


def test_what_it_runs_and_says(
    ran: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["demo", "--calibration", "demo", "--text", "demo", "--tokens", "4096"]
    monkeypatch.setattr("sys.argv", ["paper_row.py", *words, "--out", str(tmp_path / "row")])
    paper_row.main()
    assert [each["command"] for each in ran] == ["prune", "recover", "evaluate", "evaluate"]
    prune, recover, *evaluations = ran
    assert (prune["preset"], prune["param_ratio"], prune["round_to"]) == ("paper", 0.2, "1")
    settings = {name: recover[name] for name in ("loss", "lora", "learning_rate", "seq_len")}
    assert settings == {"loss": "ce", "lora": 32, "learning_rate": 4e-4, "seq_len": 1024}
    assert (recover["tokens"], recover["batch_tokens"]) == (4096, 32 * 1024)
    assert [str(each["pruned"]).rpartition("/")[2] for each in evaluations] == ["pruned", "tuned"]
    expected = [
        "| task | dense | pruned | fine-tuned |", "|---|---:|---:|---:|",
        "| boolq | 62.5 | 25.0 | 25.0 |", "| piqa | 75.0 | 50.0 | 50.0 |",
        "| mean | 68.8 | 37.5 | 37.5 |",
    ]  # fmt: skip
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(expected)
    (tmp_path / "row" / "tuned-tasks.json").unlink()
    (tmp_path / "row" / "tuned").rmdir()
    (tmp_path / "row" / "tuned.recovery").mkdir()
    ran.clear()
    paper_row.main()
    assert [each["command"] for each in ran] == ["recover", "evaluate"]
    assert ran[0]["resume"]
    assert json.loads((tmp_path / "row" / "tuned-tasks.json").read_text()) == ROWS


def test_results_of_other_settings_are_refused(
    ran: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["paper_row.py", "demo", "--calibration", "demo", "--text", "demo", "--tokens", "4096"]
    words += ["--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    paper_row.main()
    ran.clear()
    others = {"--param-ratio 0.3": "0.2", "--limit 9": "None", "--tasks x": "paper"}
    for option, was in others.items():
        monkeypatch.setattr("sys.argv", [*words, *option.split()])
        name, _, value = option.partition(" ")
        with pytest.raises(SystemExit, match=f"is of {name} {was}, not {value}; give another"):
            paper_row.main()
    assert not ran


def test_tasks_without_an_accuracy_are_one_line() -> None:
    with pytest.raises(SystemExit, match="no task has an accuracy"):
        paper_row.table(ROWS[3:], ROWS[3:])
