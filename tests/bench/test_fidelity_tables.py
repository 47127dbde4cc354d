"""What is shown of fidelity.py's rows: tables, docs/evidence.md and README.md."""

import json
import re
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import evidence_tables
import fidelity_tables
import pictures
import pytest
import report
from fidelity_variants import DEFAULT, PAPER, RANDOM, Variant, variant_of
from invented_fidelity import KL, invented, write
from invented_results import cells, write_pages


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
    write_pages(tmp_path)
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
    assert "2030-01-02 commit 0123456789" in text
    assert "8 windows of 64 tokens of one.txt, drawn with seeds 0, 1, 2" in text

    page = (root / "docs/benchmarks.md").read_text(encoding="utf-8").split("## Fidelity")[1]
    head = cells(page, "criterion", "statistic", "allocation", "refit")
    assert head == [f"{name}, {ratio}%" for name in ("small", "large") for ratio in (20, 30, 50)]
    # Twice the KL of both is the same part; 30 % was not measured.
    row = ["0.32", "", f"{mean([0.25 / 1.0, 0.55 / 1.1, 0.6 / 1.2]):.2f}"]
    assert cells(page, "fisher", "obs", "uniform", "yes") == row * 2
    links = re.findall(r"\]\(([^)#]+)", page)
    assert len(links) == 5
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


def test_a_text_that_no_row_is_measured_on_yet_is_left_out(root: Path) -> None:
    """A run on further texts was interrupted after its header."""
    folder = root / "bench/results/fidelity"
    lines = invented("small", KL)
    write(folder / "small.jsonl", [*lines, lines[0] | {"also": {"code": "code.jsonl"}}])
    assert list(report.disagreements(root)) == []


def test_without_top5_agreement_or_any_kl_of_the_papers_a_cell_is_empty(root: Path) -> None:
    kl = KL | {PAPER: {0.2: (0.0, 0.0, 0.0), 0.5: (0.0, 1.1, 1.2)}}
    write(root / "bench/results/fidelity/smollm2-135m.jsonl", invented("smollm2-135m", kl))
    report.write(root)
    text = (root / "docs/evidence.md").read_text(encoding="utf-8")
    fifth, half = text.partition("## Against other methods\n")[2].split("\n50% of the neurons")
    assert cells(fifth, "ours") == [
        "3", "0.0280 (0.0200–0.0400)", "", "30.03 (30.02–30.04)", "99.7% (99.6%–99.8%)", "",
    ]  # fmt: skip
    assert cells(half, "ours")[2] == "0.20"  # of the two seeds where the paper's is not 0
    assert cells((root / "README.md").read_text(encoding="utf-8"), "ours")[-1] == ""


def test_on_further_texts_too_the_ratio_is_to_the_papers_with_the_same_seed(root: Path) -> None:
    header, *rows = invented("smollm2-135m", KL)
    for row in rows:
        if (variant_of(row), row["seed"]) != (PAPER, 2):
            row["also"] = {"code": {"kl_nats": 3 * row["kl_nats"], "ppl_dense": 40.0}}
    lines = [header | {"also": {"code": "code.jsonl"}}, *rows]
    write(root / "bench/results/fidelity/smollm2-135m.jsonl", lines)
    report.write(root)
    text = (root / "docs/evidence.md").read_text(encoding="utf-8")
    text = text.partition("## On other texts, and in generation\n")[2]
    parts = [0.05 / 0.10, 0.03 / 0.12, 0.04 / 0.20]
    assert cells(text, "20%", "ours, uniform widths") == [
        f"0.0400 (0.0300–0.0500) ({mean(parts):.2f} ×)",
        f"0.120 (0.0900–0.150) ({mean(parts[:2]):.2f} ×)",
    ]
    # Of the two seeds that were measured on all texts.
    assert cells(text, "20%", "HFPrune, the paper's recipe") == [
        "0.110 (0.100–0.120) (1.00 ×)", "0.330 (0.300–0.360) (1.00 ×)",
    ]  # fmt: skip


def test_readme_compares_on_the_same_calibration_tokens(root: Path) -> None:
    lines = invented("smollm2-135m", KL)
    kept = [r for r in lines if "machine" in r or variant_of(r) != PAPER or r["seed"] == 1]
    write(root / "bench/results/fidelity/smollm2-135m.jsonl", kept)
    report.write(root)
    assert cells((root / "README.md").read_text(encoding="utf-8"), "ours")[0] == "0.0240"
    text = (root / "docs/evidence.md").read_text(encoding="utf-8")
    assert cells(text, "HFPrune, the paper's recipe")[:2] == ["1", "0.120"]
    assert cells(text, "ours")[:2] == ["3", "0.0280 (0.0200–0.0400)"]


def test_a_file_of_ones_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / "mine.jsonl"
    write(file, invented("mine", KL))
    assert report.main([str(file)], root) == 0
    assert capsys.readouterr().out == f"{file.with_suffix('.md')}\n"
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith("# mine (llama, 1.0 M)\n")
    assert cells(text, "entropy", "l1", "uniform", "")[0] == "1.000"


def test_criteria_are_compared_by_rank_alone_with_the_same_statistic(root: Path) -> None:
    of = {Variant("fisher", "l1"): {0.2: (0.05, 0.06, 0.1)}, Variant("entropy", "l2"): KL[RANDOM]}
    write(root / "bench/results/fidelity/smollm2-135m.jsonl", invented("smollm2-135m", KL | of))
    report.write(root)
    text = (root / "docs/evidence.md").read_text(encoding="utf-8")
    each_part = text.partition("## What each part gives\n")[2].partition("\n## ")[0]
    assert cells(each_part, "small")[2:] == ["", "0.32 (0.20–0.50)", "0.20"]
    text = text.partition("## Which criterion\n")[2].partition("\n## ")[0]
    assert cells(text, "model")[2:] == ["entropy", "fisher", "cross_entropy", "self_distillation"]
    assert cells(text, "smollm2-135m", "20%", "l1") == ["1.00", "0.50", "", ""]
    # One alone is compared with nothing.
    assert re.findall(r"^\| (smollm2-135m|small) .*\|$", text, re.M) == ["smollm2-135m"]


LINES = invented("x", KL)


def damaged(**fields: Any) -> str:
    """A file whose header or row has other fields."""
    header, row = invented("x", KL)[:2]
    (header if header.keys() & fields else row).update(fields)
    return json.dumps(header) + "\n" + json.dumps(row)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("{", "no result of fidelity.py: "),
        ("[]\n", "no header"),
        (json.dumps(invented("x", KL)[1]), "no header"),
        ("\n".join(map(json.dumps, [invented("x", {})[0], {"seed": 0}])), "a row has no criterion"),
        (damaged(machine="x"), "a header has machine 'x'"),
        (damaged(params="x"), "a header has params 'x'"),
        (damaged(calibration={}), "a header's calibration has no samples"),
        (damaged(texts=["one.txt"]), "a header has 1 texts, expected 2"),
        (damaged(kl_nats=None), "a row has kl_nats 'None'"),
        (
            "\n".join(map(json.dumps, [*LINES, LINES[0], LINES[2]])),
            f"x.jsonl: no result of fidelity.py: lines 3 and {len(LINES) + 2} are both of entropy "
            "l1 at 20%, seed 1",
        ),
        (damaged(machine={}), "a header's machine has no processor"),
        (json.dumps(LINES[0] | {"also": []}), "a header has also '[]'"),
        (damaged(also=[]), "a row has also '[]'"),
        (damaged(also={"code": {}}), "a row's text 'code' has no kl_nats"),
        (damaged(also={"code": {"kl_nats": 1}}), "a row's text 'code' has no ppl_dense"),
        ("[" * 100_000, "no result of fidelity.py: "),
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


def test_evidence_and_readme(root: Path) -> None:
    of_others = {Variant("flap", "fluctuation", "global", correction="bias"): KL[RANDOM]}
    lines = invented("smollm2-135m", KL | of_others, 135_000_000)
    for row in lines[1:]:
        row["top5_agreement"] = 0.5
    on_code = [next(r for r in lines[1:] if variant_of(r) == v) for v in (PAPER, DEFAULT)]
    for row, nats in zip(on_code, (0.5, 0.25), strict=True):
        row["also"] = {"code": {"kl_nats": nats, "ppl_dense": 40.0, "ppl_pruned": 50.0}}
        row["generated"] = {
            "prompts": 64, "prompt_tokens": 32, "new_tokens": 16, "common_prefix": 3.25,
            "equal_tokens": 0.125,
        }  # fmt: skip
    lines[0]["also"] = {"code": "code.jsonl"}
    write(root / "bench/results/fidelity/smollm2-135m.jsonl", lines)
    header = {**lines[0], "model": "smollm2-135m-mixed", "texts": ["mixed.txt", "two.txt"]}
    of_mixed = [{k: v for k, v in row.items() if k != "generated"} for row in on_code]
    write(root / "bench/results/fidelity/smollm2-135m-mixed.jsonl", [header, *of_mixed])
    page = "## Claims\n\nOurs: 0.0280, of small 0.20. {}\n\n"
    for title in (
        "Against other methods", "On other texts, and in generation", "On small models",
        "What each part gives", "Which criterion", "How many calibration windows",
    ):  # fmt: skip
        page += f"## {title}\n\nold\n\n"
    evidence, readme = root / "docs/evidence.md", root / "README.md"
    evidence.write_text(page + "## Limits\n\nwords\n", encoding="utf-8")
    first = "| 20% of the neurons removed by |"
    readme.write_text(f"before\n\n{first} old |\n|---|---|\n\nafter\n", encoding="utf-8")
    report.write(root)

    text = evidence.read_text(encoding="utf-8")
    assert text.endswith("\n## Limits\n\nwords\n")
    assert "\nold\n" not in text
    real = text.partition("## Against other methods\n")[2].partition("50% of the neurons")[0]
    # The mean of three seeds, and the mean of their ratios to the paper's.
    assert cells(real, "ours")[:3] == ["3", "0.0280 (0.0200–0.0400)", "0.20"]
    assert cells(real, "FLAP with its bias")[1] == "0.300"
    methods = re.findall(r"^\| (.+?) +\|", real, re.M)[1:]
    assert {*methods[:2]} == {"FLAP with its bias", "at random"}
    assert methods[-1] == "**ours**"
    other = text.partition("## On other texts, and in generation\n")[2].partition("\n## ")[0]
    other, mixed = other.removeprefix("\nKL(").split("\nKL(")
    assert "calibrated on mixed.txt." in mixed
    assert cells(mixed, "20%", "ours") == ["0.0200 (0.20 ×)", "0.250 (0.50 ×)"]
    assert "Greedy continuations of 64 prompts of 32 tokens, 16 tokens each" in other
    nats, on_code = cells(other, "20%", "ours")[:2]
    assert (nats, on_code) == ("0.0200 (0.20 ×)", "0.250 (0.50 ×)")  # of seed 0 alone
    assert cells(other, "20%", "ours")[2:] == ["3.2", "12.5%"]
    assert len(re.findall(r"^\| 20%", other, re.M)) == 2  # those that were measured there
    small = text.partition("## On small models\n")[2]
    assert "[small (llama, 1.0 M)]" in small
    assert "smollm2" not in small.partition("\n## ")[0]
    curves = (root / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert "[smollm2-135m " in curves
    assert "smollm2-135m-mixed" not in curves  # one ratio is no curve
    assert evidence_tables.unsupported_claims(text) == []
    evidence.write_text(text.replace("{}", "3.14"), encoding="utf-8")
    assert "docs/evidence.md: a claim says 3.14, which" in "".join(report.disagreements(root))

    shown = readme.read_text(encoding="utf-8")
    assert shown.startswith(f"before\n\n{first} ")
    assert shown.endswith(" |\n\nafter\n")
    kl, perplexity, top1, top5 = cells(shown, "ours")
    assert (kl, perplexity) == ("0.0280 (0.0200–0.0400)", "30.03 (30.02–30.04)")
    assert (top1, top5) == ("99.7% (99.6%–99.8%)", "50.0%")

    evidence.write_text(text.replace("## Claims", "## Said"), encoding="utf-8")
    readme.write_text(shown.replace("20% of", "A fifth of"), encoding="utf-8")
    lost = [line for line in report.disagreements(root) if "nothing begins with" in line]
    assert [line.partition(":")[0] for line in lost] == ["docs/evidence.md", "README.md"]
