"""The page says what the record says, is self-contained, and shows hostile text as text."""

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from hfprune_fast.errors import CheckpointError
from hfprune_fast.evaluation.changes import ChangedToken, PositionBin
from hfprune_fast.evaluation.fidelity import Fidelity
from hfprune_fast.report import pictures
from hfprune_fast.report.facts import ExpertFacts, Facts, Measurement, read_facts
from hfprune_fast.report.page import Report, page

HOSTILE = (
    "<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>", "\"' onload='x'",
    "&lt;b&gt;&amp;", "$\\frac{1}{0}$", "a\n\x1b[31m\x07\x00", "\ud800", "`rm -rf`", "x" * 5000,
)  # fmt: skip
VOID = {"meta", "br", "img", "link", "input", "hr"}
BINS = (PositionBin(0, 31, 0.03, 320), PositionBin(32, 63, 0.01, 320))
MEASURED = Measurement("heldout.txt", Fidelity(0.02, 31.5, 32.25, 0.875, 640, 0.96), BINS)
NO_CHANGE = ChangedToken("text up to", 3, " here", " a", 0.5, " b", 0.25, 1.5)


class Page(HTMLParser):
    """Tags that are all closed in order, no id twice, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.loaded.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(layers: int = 3, dense: int = 96, layout: str = "custom", **changes: Any) -> Report:
    step = dense // 8
    widths = tuple(
        dense - step * (1 + layer % 3 * (layout != "uniform")) for layer in range(layers)
    )
    facts = Facts(
        base_model="org/model", layout=layout, widths=widths,
        dense_widths=(dense,) * layers, params=902_272, dense_params=1_049_728, prune_ratio=0.25,
        param_ratio=0.14, allocation="uniform",
        allocations_kl_nats={"uniform": 0.03, "measured": 0.05},
        measurement=MEASURED,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(layers, dense, generator=generator, dtype=torch.float64) ** 4
    report = Report(
        name="out", facts=facts, loading="Load it with `it`.", about=[("calibration", "text.txt")],
        ranked=scores.sort(dim=1, descending=True).values, importance_unit="nats",
        changed=[NO_CHANGE], seconds={"scoring": 3.0}, peak_bytes={"host memory": 1 << 30},
    )  # fmt: skip
    return replace(report, **changes)


def checked(html: str) -> Page:
    found = Page(html)
    assert len(found.ids) == len(set(found.ids))
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & set(found.tags)
    assert all(target.startswith(("#", "data:image/png")) for target in found.loaded)
    assert not re.search(r"url\((?!#)|@import", html)
    assert "default-src 'none'" in html
    return found


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take half a second; they hold no names."""
    for name in ("widths", "importance", "allocations", "kl_by_position"):
        svg = f'<svg role="img"><g id="{name}"></g></svg>'
        monkeypatch.setattr(pictures, name, lambda *_, svg=svg: svg)


@pytest.mark.usefixtures("no_pictures")
def test_each_allocation_is_explained() -> None:
    found = checked(page(report_of())).text
    assert "cut at the same height" in found
    assert "uniform gives all the same" in found
    measured = replace(report_of().facts, allocation="measured")
    found = checked(page(report_of(facts=measured))).text
    assert "cut at the same height" not in found
    assert "measured ranks all neurons together" in found


@pytest.mark.parametrize(("layers", "dense"), [(1, 8), (3, 96), (80, 256)])
def test_every_size(layers: int, dense: int) -> None:
    found = checked(page(report_of(layers, dense)))
    assert found.tags.count("svg") == 4
    for label in ("MLP neurons", "nats a token", "most important first", "position in the window"):
        assert label in found.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("layout", ["uniform", "padded", "custom", "decilm", "native"])
def test_every_layout(layout: str) -> None:
    found = checked(page(report_of(layout=layout)))
    for said in ("25.00%", "902,272 of 1,049,728", "0.0200", "32.25", "87.5%", "3.0 s", "1.0 GiB"):
        assert said in found.text, said
    has_own_code = "import hfprune_fast" in found.text
    assert has_own_code == (layout == "custom")
    assert ("vllm serve out" in found.text) == (layout == "decilm")
    assert "docs/serving.md" in found.text
    assert "hfprune export" not in found.text  # which forms there are depends on the model
    assert "not shown" not in found.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown(text: str) -> None:
    facts = report_of().facts
    token = replace(NO_CHANGE, context=text, follows=text, dense_top=text, pruned_top=text)
    measured = replace(MEASURED, text=text)
    hostile = report_of(
        facts=replace(facts, base_model=text, allocation=text, measurement=measured),
        name=text, about=[("calibration", text)], changed=[token], importance_unit="nats",
    )  # fmt: skip
    found, plain = checked(page(hostile)), checked(page(report_of()))
    # Code in backticks apart, the same elements as of a harmless page.
    assert [t for t in found.tags if t != "code"] == [t for t in plain.tags if t != "code"]
    if text.isprintable() and len(text) < 200:
        assert text in found.text
    page(hostile).encode()


@pytest.mark.usefixtures("no_pictures")
def test_what_is_not_there_is_said_and_left_out() -> None:
    facts = replace(report_of().facts, allocations_kl_nats={}, measurement=None)
    empty: dict[str, Any] = {"ranked": None, "changed": [], "seconds": {}, "peak_bytes": {}}
    html = page(report_of(facts=facts, **empty))
    found = checked(html)
    assert found.tags.count("svg") == 1
    (said,) = re.findall(r"Not recorded or not given, so not shown: .*", found.text)
    for missing in ("importance", "allocation", "fidelity", "time and memory"):
        assert missing in said
    for title in ("Fidelity", "Allocations", "Time and memory", "What changed most"):
        assert f"<h2>{title}" not in html


@pytest.mark.parametrize("layers", [2, 12])
def test_the_same_bytes_again(layers: int) -> None:
    assert page(report_of(layers)) == page(report_of(layers))


@pytest.mark.parametrize("important", [[], [0]])
def test_scores_of_zero_are_drawn_or_left_out(important: list[int]) -> None:
    ranked = torch.zeros(3, 96, dtype=torch.float64)
    ranked[:, important] = 1.0
    assert checked(page(report_of(ranked=ranked))).tags.count("svg") == 3 + len(important)


FILE = Path("pruned/hfprune.json")
RECORD: dict[str, Any] = {
    "base_model": "org/model", "hfprune_fast": "0.1.0",
    "keep": {"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [1]},
    "achieved": {
        "dense_intermediate_size": 4, "intermediate_size": 2, "params": 9, "dense_params": 12,
        "prune_ratio": 0.5, "param_ratio": 0.25, "layout": "custom", "mlp_widths": [2, 1],
    },
    "chosen": {"allocation": "measured", "allocations_kl_nats": {"uniform": 0.2, "measured": 0.1}},
    "fidelity": MEASURED.record(),
}  # fmt: skip


def test_adapters_have_no_report() -> None:
    with pytest.raises(CheckpointError, match=r"^pruned/hfprune\.json is of adapters, or of a"):
        read_facts({"base_model": "org/model", "recovery": {}}, FILE)


def test_a_record_is_read_as_it_is_written() -> None:
    facts = read_facts(RECORD, FILE)
    assert (facts.widths, facts.dense_widths, facts.allocation) == ((2, 1), (4, 4), "measured")
    assert facts.allocations_kl_nats == {"uniform": 0.2, "measured": 0.1}
    assert facts.measurement == MEASURED


EXPERTS = "model.layers.{}.mlp.experts.{}"
OF_EXPERTS: dict[str, Any] = {
    **RECORD,
    "keep": {
        "model.layers.0.mlp": [0, 1],
        **{EXPERTS.format(layer, e): [e, 7] for layer in (1, 2) for e in (0, 3, 5)},
    },
    "achieved": {
        "dense_intermediate_size": 4, "intermediate_size": 2, "params": 9, "dense_params": 12,
        "prune_ratio": 0.5, "param_ratio": 0.25, "mlp_widths": [2, 0, 0],
        "dense_mlp_widths": [4, 0, 0], "experts": 3, "dense_experts": 8, "expert_width": 2,
        "dense_expert_width": 8, "active_params": 5, "dense_active_params": 9,
    },
}  # fmt: skip


def test_a_record_of_experts_is_read_and_shown() -> None:
    facts = read_facts(OF_EXPERTS, FILE)
    assert (facts.widths, facts.dense_widths) == ((2, 0, 0), (4, 0, 0))
    assert facts.experts == ExpertFacts(3, 8, 2, 8, 5, 9)
    html = page(report_of(ranked=None, facts=facts))
    checked(html)
    said = "3 of 8 experts, 2 of 8 neurons of each and 2 of 4 neurons of other MLPs"
    assert html.count(said) == 2
    assert "parameters a token uses" in html
    no_own = {site: n for site, n in OF_EXPERTS["keep"].items() if "experts" in site}
    sizes = {"mlp_widths": [0, 0, 0], "intermediate_size": 0}
    dense = {"dense_mlp_widths": [0, 0, 0], "dense_intermediate_size": 0}
    achieved = {**OF_EXPERTS["achieved"], **sizes, **dense}
    facts = read_facts({**OF_EXPERTS, "keep": no_own, "achieved": achieved}, FILE)
    checked(page(report_of(ranked=None, facts=facts)))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (["keep", EXPERTS.format(1, 3)], [1]), (["keep", EXPERTS.format(1, 4)], [1, 2]),
        (["achieved", "experts"], 4), (["achieved", "dense_experts"], 2),
        (["achieved", "expert_width"], 3), (["achieved", "dense_expert_width"], "8"),
        (["achieved", "active_params"], None), (["keep", "model.layers.1.mlp"], [1]),
        (["achieved", "dense_mlp_widths"], [4, 4, 0]), (["keep", "model.layers.mlp"], [1]),
        (["keep", "model.layers.1.mlp.2.experts"], [1]), (["keep", "0"], [0, 1]),
        (["keep", "model.layers.99999.mlp"], [0]),
    ],
)  # fmt: skip
def test_a_damaged_record_of_experts_is_one_line(where: Sequence[str], value: Any) -> None:
    record = {name: dict(v) if isinstance(v, dict) else v for name, v in OF_EXPERTS.items()}
    record[where[0]][where[1]] = value
    with pytest.raises(CheckpointError, match=r"^pruned/hfprune\.json is damaged") as error:
        read_facts(record, FILE)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (["keep"], {}), (["keep"], {"1": [0]}), (["keep"], {"0": 7}), (["keep"], None),
        (["keep"], {"0": [0] * 5, "1": [0]}), (["achieved"], None), (["achieved"], []),
        (["achieved", "params"], -1), (["achieved", "params"], "9"), 
        (["achieved", "params"], 1 << 99), (["chosen", "allocations_kl_nats"], {"<b>": 0.1}),
        (["achieved", "prune_ratio"], float("nan")), (["achieved", "prune_ratio"], "x"),
        (["achieved", "dense_mlp_widths"], [4]), (["achieved", "dense_intermediate_size"], 10**30),
        (["chosen", "allocations_kl_nats"], {"uniform": "<b>"}), (["chosen"], [1]),
        (["fidelity"], {}), (["fidelity", "kl_nats"], float("inf")),
        (["fidelity", "kl_nats_by_position"], [[0, 1]]),
        (["fidelity", "kl_nats_by_position"], [[0, 3, 0.1, 9], [2, 5, 0.1, 9]]),
        (["fidelity", "kl_nats_by_position"], [[0, 3, 1e300, 9]]), (["keep"], {"0": []}),
        (["achieved", "dense_mlp_widths"], [0, 0]), (["fidelity", "tokens"], True),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_line(where: Sequence[str], value: Any) -> None:
    record = {name: dict(v) if isinstance(v, dict) else v for name, v in RECORD.items()}
    place: Any = record
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    with pytest.raises(CheckpointError, match=r"^pruned/hfprune\.json is damaged") as error:
        read_facts(record, FILE)
    assert len(str(error.value)) < 400
