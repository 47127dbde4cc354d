"""bench/fidelity on models with experts: sizes, what is kept, and the table in docs/experts.md."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import report
import torch
from fidelity_mixture import keep, sizes
from fidelity_subject import Seed, Subject
from fidelity_variants import MIXTURE_RATIOS, MIXTURES, Variant, dropped
from invented_fidelity import invented_header
from invented_results import cells, write_pages
from tiny_model import RECIPES, new_model
from transformers import AutoTokenizer

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.calibration import calibrate

CALIBRATION, HELD_OUT = TINY_MODEL / "calibration.txt", TINY_MODEL / "heldout.txt"
SEQ_LEN, SAMPLES = 64, 8
BOTH = [v for v in MIXTURES if v.dropped_by and v.criterion]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The mixture of tools/tiny_model.py, untrained, in fp32."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    torch.manual_seed(0)
    model = new_model(RECIPES["qwen2_moe"], tokenizer.bos_token_id, tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_source(folder)


@pytest.fixture(scope="module")
def seed(source: ModelSource) -> Seed:
    held_out = calibrate(HELD_OUT, source, CalibrationOptions(4, SEQ_LEN))
    calibration = calibrate(CALIBRATION, source, CalibrationOptions(SAMPLES, SEQ_LEN))
    return Seed(Subject(source, held_out), calibration, 0)


def test_all_variants_are_of_one_size(source: ModelSource) -> None:
    """But for the router's rows, which only dropped experts take with them."""
    spec = source.spec
    rows = spec.num_layers * spec.num_experts * spec.params_per_expert
    for ratio in MIXTURE_RATIOS:
        found = {v: s for v in MIXTURES if (s := sizes(v, ratio, spec))}
        params = [spec.params_at(shared, (count, width)) for count, width, shared in found.values()]
        assert max(params) - min(params) <= rows * ratio
        neurons = {s.experts * s.width + s.shared for s in found.values()}
        assert neurons == {8 * 128 * (1 - ratio) + 128}
    assert sizes(BOTH[0], 0.5, spec) == (6, 88, 112)
    assert all(sizes(variant, 0.25, spec) is None for variant in BOTH)
    with pytest.raises(ValueError, match=r"0\.3 of 8 experts of 128 neurons is no whole number"):
        sizes(MIXTURES[0], 0.3, spec)


def test_each_variant_keeps_by_its_own_scores(seed: Seed) -> None:
    kept = set()
    # With so few tokens an expert, removal costs give way to l2.
    as_l2 = Variant("fisher", "obs", "experts")
    ranked = [variant for variant in MIXTURES if not variant.refit and variant != as_l2]
    for variant in ranked:
        found = seed.keep(variant, 0.5)
        assert {site for site in found if isinstance(site, int)} == set(range(4))
        parts = [f"{site}{neurons.tolist()}" for site, neurons in sorted(found.items(), key=str)]
        kept.add("".join(parts))
    assert len(kept) == len(ranked)


def test_random_experts_are_drawn_by_the_seed_and_layer(seed: Seed) -> None:
    def drawn(number: int) -> list[list[int]]:
        found = keep(dropped("random", False), 0.5, seed.scores, number)
        experts = [site for site in found if not isinstance(site, int)]
        return [[e for layer, e in experts if layer == wanted] for wanted in range(4)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert all(len(of_layer) == 4 for of_layer in drawn(0))
    assert len({tuple(of_layer) for of_layer in drawn(0)}) > 1


def test_what_is_measured_is_what_is_written(
    source: ModelSource, seed: Seed, tmp_path: Path
) -> None:
    row = seed.row(dropped("fisher taylor", True), 0.25)
    assert (row["experts"], row["widths"]) == ((6, 128), [128] * 4)
    assert row["experts_not_refitted"] == 24, "more tokens than a refit needs"
    written = hf.oneshot(
        source.folder, CALIBRATION, tmp_path / "dropped", expert_ratio=0.25, criterion="fisher",
        samples=SAMPLES, seq_len=SEQ_LEN, dtype="float32", device="cpu",
    )  # fmt: skip
    ids = calibrate(HELD_OUT, source, CalibrationOptions(4, SEQ_LEN)).batches[0].ids
    pruned = load_model(tmp_path / "dropped", dtype="float32", device="cpu")
    want = hf.evaluate(seed.subject.model, pruned, ids)
    assert written["param_ratio"] == pytest.approx(row["param_ratio"], rel=1e-12)
    assert row["kl_nats"] == pytest.approx(want.kl_nats, rel=1e-4)


def invented() -> list[dict[str, Any]]:
    header = invented_header("mixed", "qwen2_moe", 2_000_000)
    rows = [
        {
            **vars(variant), "prune_ratio": ratio, "seed": seed, "widths": [128] * 4,
            "experts": [6, 128], "experts_not_refitted": None, "param_ratio": ratio / 2,
            "kl_nats": ratio * (number + 1) + seed / 10, "ppl_dense": 30.0, "ppl_pruned": 31.0,
            "top1_agreement": 0.9 - ratio / 10, "tokens": 256,
        }
        for number, variant in enumerate(MIXTURES)
        for ratio in ((0.5,) if variant in BOTH else (0.25, 0.5))
        for seed in range(3)
    ]  # fmt: skip
    return [header, *rows]


def test_the_page_has_the_numbers_of_the_rows_and_keeps_its_words(tmp_path: Path) -> None:
    folder = tmp_path / "bench/results/fidelity"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(line) + "\n" for line in invented())
    (folder / "mixed.jsonl").write_text(lines, encoding="utf-8")
    write_pages(tmp_path)
    page = tmp_path / "docs/experts.md"
    page.write_text("# Experts\n\n## What was measured\n\nOld.\n\n## Else\n\nWords.\n")
    report.write(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Experts\n\n## What was measured\n\nmixed (qwen2_moe, 2.0 M): KL")
    assert text.endswith(" |\n\n## Else\n\nWords.\n")
    assert "12.5% and 25.0% of all parameters are removed" in text
    assert "mean over 3 calibration seeds" in text
    assert cells(text, "fisher taylor", "", "", "") == [
        "0.350 (0.250–0.450)", "0.875", "0.600 (0.500–0.700)", "0.850",
    ]  # fmt: skip
    both = MIXTURES.index(Variant("fisher", "obs", "uniform", True, "fisher taylor"))
    kl = [0.5 * (both + 1) + seed / 10 for seed in range(3)]
    found = cells(text, "fisher taylor", "fisher obs", "all MLPs", "yes")
    assert found == ["", "", f"{mean(kl):.1f} ({kl[0]:.1f}–{kl[2]:.1f})", "0.850"]
    of_all = (folder / "mixed.md").read_text(encoding="utf-8")
    assert "times that of the paper's" not in of_all
    assert cells(of_all.split("## Perplexity")[1], "reap", "", "", "yes") == ["31.00", "31.00"]
    assert "mixed" not in (tmp_path / "docs/benchmarks.md").read_text(encoding="utf-8")
    page.write_text(text.replace("0.350", "0.351"), encoding="utf-8")
    (line,) = list(report.disagreements(tmp_path))
    assert line.startswith("docs/experts.md: line ")
