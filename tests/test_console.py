import re
import time
from dataclasses import asdict
from typing import Any

import pytest

from hfprune_fast.config import PRESETS, Recipe
from hfprune_fast.console import human_bytes, mute, say, text_table, token_bar
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.pruning.model_card import model_card


def test_table_is_aligned() -> None:
    table = text_table(("", "KL"), [("dense", "0"), ("at random", "12.5")])
    assert table == "             KL\n---------  ----\ndense         0\nat random  12.5"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (14 << 30, "14.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_model_card() -> None:
    size = ModelSpec("llama", 2, 8, 100, 10_000, 9_000, 24)
    record: dict[str, Any] = {"base_model": "org/name", "achieved": size.pruned_to(80)}
    card = model_card(record)
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: org/name\n")
    assert "| MLP neurons a layer | 80 of 100 |" in card
    assert "| parameters | 9,040 of 10,000 |" in card
    assert "calibration" not in card
    record |= {
        "base_model": "local",
        "requested": {**asdict(PRESETS["paper"]), "statistic": "l2"},
        "provenance": {"samples": 3, "tokens": 96, "calibration": {"source": "a.txt"}},
    }
    card = model_card(record)
    assert "base_model:" not in card  # a folder's name is no hub name
    assert "| ranked by | criterion `entropy`, statistic `l2` |" in card
    assert "| allocation | uniform |" in card
    assert "refitted" not in card
    default = {**record, "requested": asdict(Recipe()), "chosen": {"allocation": 0.5}}
    assert "| allocation | halfway between uniform and global |" in model_card(default)
    assert "| down_proj | refitted to the dense model by least squares |" in model_card(default)
    assert "| calibration size | 3 samples, 96 tokens |" in card
    assert model_card({**record, "provenance": {"calibration": "edited by hand"}})


def test_the_token_bar_says_how_fast_and_how_much_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with token_bar("scoring", 1000, True, flops_per_token=10**9) as on_progress:
        for _ in range(30):
            time.sleep(0.01)
            on_progress(1000 / 30)
    seen = capsys.readouterr().err
    assert "scoring: 100%" in seen
    assert "1.00k/1.00k" in seen  # thirds of tokens add up to whole ones
    assert re.search(r"tok/s, peak=\d+\.\d [MG]iB, FLOP/s=\d", seen)


def test_what_a_failed_attempt_has_counted_is_taken_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with token_bar("scoring", 10, True) as on_progress:
        on_progress(7.5)
        on_progress(-7.5)
        for _ in range(4):
            on_progress(2.5)
    assert "10.0/10.0" in capsys.readouterr().err


def test_other_processes_say_and_show_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfprune_fast.console._muted", False)  # and again after the test
    mute()
    say("nothing")
    with token_bar("scoring", 10, True) as on_progress:
        on_progress(10)
    assert capsys.readouterr().err == ""
