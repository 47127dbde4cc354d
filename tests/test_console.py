import re
import time

import pytest

from hfprune_fast.console import human_bytes, mute, say, text_table, token_bar


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
