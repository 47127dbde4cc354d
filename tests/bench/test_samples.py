"""bench/fidelity/samples.py: which windows, what is compared, what a rerun goes on from."""

import copy
import json
from pathlib import Path
from typing import Any

import fidelity_tables
import pytest
import samples
import samples_tables
import torch
from family_models import tiny_family_model
from fidelity_subject import CRITERIA
from fidelity_variants import DEFAULT
from invented_results import cells
from records import ResultError
from torch import Tensor

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.data.batches import MicroBatch, token_data
from hfprune_fast.pruning.selection import WidthBudget

CALIBRATION, HELD_OUT = TINY_MODEL / "calibration.txt", TINY_MODEL / "heldout.txt"


def test_first_windows_are_in_an_order_drawn_by_the_seed() -> None:
    data = token_data(torch.arange(24).view(12, 2), 24)
    few, more = (samples.first(data, count, 0).batches[0].ids for count in (4, 12))
    assert torch.equal(few, more[:4])
    assert sorted(more[:, 0].tolist()) == list(range(0, 24, 2))
    assert not torch.equal(few, data.batches[0].ids[:4])
    assert not torch.equal(few, samples.first(data, 4, 1).batches[0].ids)


def test_the_most_costly_are_what_is_kept() -> None:
    costs = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    found = samples.most_costly(costs, [8, 8, 8])
    for layer, kept in WidthBudget(8, (20,) * 3).keep(costs).items():
        assert found[layer].nonzero()[:, 0].tolist() == kept.tolist()
    assert samples.most_costly(costs, [1, 2, 3]).sum(dim=1).tolist() == [1, 2, 3]


def test_the_squared_error_is_of_the_streams_after_each_layer() -> None:
    dense = tiny_family_model("llama")
    pruned = copy.deepcopy(dense)
    hf.prune(pruned, {layer: torch.arange(0, 40, 2) for layer in range(3)})
    ids = torch.randint(3, 120, (4, 9), generator=torch.Generator().manual_seed(0))

    def streams(model: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _m, _i, output: seen.append(output))
        model(input_ids=ids)
        return seen

    x, h = (streams(copy.deepcopy(model)) for model in (dense, pruned))
    assert len(x) == len(h) == 3
    parts = [float((a - b).square().sum() / a.square().sum()) for a, b in zip(x, h, strict=True)]
    batches = MicroBatch(ids, (9,) * 4).split(3)
    found = samples.squared_error(dense, pruned, batches)
    assert found == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert samples.squared_error(dense, dense, batches) == 0


def test_rows_of_a_run_and_what_a_rerun_adds(
    tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def run(*more: str) -> str:
        capsys.readouterr()
        code = samples.main(
            ["demo", "--calibration", str(CALIBRATION), "--text", str(HELD_OUT),
             "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--seeds", "0",
             "--samples", "4", "8", "100000", "--ratios", "0.5", "--eval-samples", "2",
             "--seq-len", "64", *more]
        )  # fmt: skip
        said = capsys.readouterr().err
        assert code == 0, said
        return said

    assert "1/2: seed 0, 8 windows of 64 tokens, 50% in " in run()
    file = tmp_path / "demo-samples.jsonl"
    header, most, few = map(json.loads, file.read_text().splitlines())
    assert header["calibration"] == {"samples": 8, "seq_len": 64}
    assert (most["samples"], most["kept_overlap"], most["score_regret"]) == (8, 1, 0)
    assert few["samples"] == 4
    assert most["seq_len"] == few["seq_len"] == 64
    assert 0.6 < few["kept_overlap"] < 1
    assert few["score_regret"] > 0
    assert few["squared_error"] > most["squared_error"] > 0

    tables = [hf.ImportanceTable.load(tmp_path / f"work/demo-samples-seed0-{n}-scores.safetensors")
              for n in (8, 4)]  # fmt: skip
    assert tables[0].criteria == ("fisher",) != CRITERIA
    costs = [table.importance("obs") for table in tables]
    kept = [
        samples.most_costly(c, row["widths"]) for c, row in zip(costs, (most, few), strict=True)
    ]
    alike = float((kept[0] & kept[1]).sum() / kept[0].sum())
    assert few["kept_overlap"] == pytest.approx(alike, rel=1e-4)
    removed = [float(costs[0][~each].sum()) for each in kept]
    assert few["score_regret"] == pytest.approx(removed[1] / removed[0] - 1, rel=1e-4)

    # Interrupted after the first row: the other comes again, of the scores that are there.
    monkeypatch.setattr(hf, "score", lambda *_, **__: pytest.fail("scored again"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    assert "1/1: seed 0, 4 windows of 64 tokens, 50% in " in run()
    again = json.loads(file.read_text().splitlines()[-1])
    assert {**again, "cpu_seconds": 0} == {**few, "cpu_seconds": 0}

    # As many tokens in windows of another length, measured on the same windows as the others.
    monkeypatch.undo()
    assert "1/1: seed 0, 16 windows of 32 tokens, 50% in " in run("--lengths", "32")
    short = json.loads(file.read_text().splitlines()[-1])
    assert (short["samples"], short["seq_len"], short["tokens"]) == (16, 32, few["tokens"])
    assert short["ppl_dense"] == few["ppl_dense"]
    assert 0.6 < short["kept_overlap"] < 1
    assert "seed 0" not in run("--lengths", "32")


def test_lengths_of_windows_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["demo", "--calibration", str(CALIBRATION), "--text", str(HELD_OUT)]
    start += ["--out", str(tmp_path), "--seq-len", "64", "--samples", "8", "--lengths"]
    for wrong, reason in (
        (["64"], "--lengths 64: expected 2 or more, and not --seq-len"),
        (["1"], "--lengths 1: expected 2 or more, and not --seq-len"),
        (["128", "128"], "--lengths has 128 twice"),
    ):
        with pytest.raises(SystemExit):
            samples.main([*start, *wrong])
        assert reason in capsys.readouterr().err
    for length in ("200", "1024"):
        assert samples.main([*start, length]) == 2
        said = capsys.readouterr().err
        assert said == f"samples.py: --lengths {length} does not divide the 512 tokens in all\n"
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_the_numbers_of_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "bench/results/fidelity"
    folder.mkdir(parents=True)
    header = {
        "model": "small", "model_type": "llama", "params": 1_000_000,
        "calibration": {"samples": 32, "seq_len": 64}, "texts": ["one.txt", "other.txt"],
        "machine": {"processor": "Inventa 9", "cores": 2}, "date": "2030-01-02T15:00:00+00:00",
    }  # fmt: skip
    rows = [
        {
            **vars(DEFAULT), "prune_ratio": 0.2, "seed": seed, "widths": [10], "param_ratio": 0.1,
            "kl_nats": 0.1 + seed / 10, "ppl_dense": 30.0, "ppl_pruned": 31.0, "tokens": 256,
            "top1_agreement": 0.9, "samples": count, "kept_overlap": count / 32,
            "score_regret": 0.25, "squared_error": 0.0123, "cpu_seconds": 60.0,
        }
        for count in (32, 16)
        for seed in (0, 1)
    ]  # fmt: skip
    lines = "".join(json.dumps(line) + "\n" for line in [header, *rows])
    (folder / "small-samples.jsonl").write_text(lines, encoding="utf-8")
    assert fidelity_tables.all_of(tmp_path) == []
    text = "\n".join(samples_tables.section(fidelity_tables.all_of(tmp_path, samples=True)))
    found = cells(text, "20%", "16")
    assert found == ["102", "0.150 (0.100–0.200)", "50.0%", "+25.0%", "1.23%", "60.0"]
    assert text.index("| 20%     | 16") < text.index("| 20%     | 32")
    assert "tokens a window" not in text
    longer = {**rows[0], "samples": 16, "seq_len": 128, "kl_nats": 0.075}
    (folder / "small-samples.jsonl").write_text(lines + json.dumps(longer), encoding="utf-8")
    text = "\n".join(samples_tables.section(fidelity_tables.all_of(tmp_path, samples=True)))
    usual, of_lengths = text.split("| tokens a window")
    assert cells(usual, "20%", "16") == found
    again = {**rows[0], "seq_len": 64}
    (folder / "small-samples.jsonl").write_text(lines + json.dumps(again), encoding="utf-8")
    with pytest.raises(ResultError, match="lines 2 and 6 are both of"):
        fidelity_tables.all_of(tmp_path, samples=True)
    assert cells(of_lengths, "20%", "64")[:2] == ["32", "0.150 (0.100–0.200)"]
    assert cells(of_lengths, "20%", "128")[:2] == ["16", "0.0750"]
    for field in ("samples", "widths", "kept_overlap", "score_regret", "squared_error"):
        row = {name: value for name, value in rows[0].items() if name != field}
        (folder / "small-samples.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
        with pytest.raises(ResultError, match=f"a row has no {field}"):
            fidelity_tables.all_of(tmp_path, samples=True)
