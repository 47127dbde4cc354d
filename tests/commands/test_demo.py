import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.pretrained import load_tokenizer
from hfprune_fast.commands import demo


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo.run(tmp_path_factory.mktemp("demo") / "pruned")


@pytest.mark.slow
def test_entropy_beats_magnitude_and_random(result: dict[str, Any]) -> None:
    kl = {name: row["kl_nats"] for name, row in result["fidelity"].items()}
    assert kl["dense"] == 0
    assert 0 < kl["default"] < 0.5 * kl["entropy"]
    assert kl["default"] < kl["uniform"] < 0.6 * kl["entropy"]
    assert kl["magnitude"] > 1.2 * kl["entropy"]
    assert kl["random"] > 1.2 * kl["entropy"]


@pytest.mark.slow
def test_dense_loss_is_in_the_range_that_training_states(result: dict[str, Any]) -> None:
    training = json.loads((TINY_MODEL / "training.json").read_text())
    low, high = training["heldout_range_nats"]
    assert low < math.log(result["fidelity"]["dense"]["ppl_dense"]) < high


@pytest.mark.slow
def test_readme_table_is_what_the_demo_prints(result: dict[str, Any]) -> None:
    """Within 2 %: other machines round in other places."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = {
        "default": "by hfprune |",
        "uniform": "by hfprune, uniform widths",
        "entropy": "by entropy",
        "magnitude": "by weight magnitude",
        "random": "at random",
    }
    for name, title in rows.items():
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| pruned {title}")]
        kl, ppl = (float(cell.strip(" *")) for cell in line.split("|")[3:5])
        row = result["fidelity"][name]
        assert kl == pytest.approx(row["kl_nats"], rel=0.02)
        assert ppl == pytest.approx(row["ppl_pruned"], rel=0.02)


@pytest.mark.slow
def test_a_quarter_of_the_neurons_is_removed(result: dict[str, Any]) -> None:
    assert result["prune_ratio"] == pytest.approx(0.25, abs=0.5 / result["dense_intermediate_size"])
    model = AutoModelForCausalLM.from_pretrained(result["out"])
    assert model.config.intermediate_size == result["intermediate_size"]
    assert sum(p.numel() for p in model.parameters()) == result["params"]


@pytest.mark.slow
def test_table_has_a_row_for_each_choice(result: dict[str, Any]) -> None:
    table = demo.text(result)
    for row in ("dense", "pruned by entropy", "pruned by weight magnitude", "pruned at random"):
        assert f"\n{row}" in table
    assert f"{result['fidelity']['entropy']['kl_nats']:.4f}" in table


def test_what_ships() -> None:
    files = list(TINY_MODEL.iterdir())
    assert sum(p.stat().st_size for p in files) < 4.2e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    held_out = (TINY_MODEL / "heldout.txt").read_text(encoding="utf-8")
    calibration = (TINY_MODEL / "calibration.txt").read_text(encoding="utf-8")
    assert len(load_tokenizer(TINY_MODEL)(held_out)["input_ids"]) >= 20_000
    paragraphs = {p.strip() for p in held_out.split("\n\n")}
    assert not paragraphs & {p.strip() for p in calibration.split("\n\n") if p.strip()}


def test_existing_output_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "score", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(ValueError, match="--force"):
        demo.run(tmp_path / "out")
