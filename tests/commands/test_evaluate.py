import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hfprune_fast as hf

WARNING = "was also the calibration text, so these numbers are optimistic; use held-out text"


def test_text_that_calibrated_the_model_is_named(
    text_file: Path, tmp_path: Path, hfprune: Callable[..., Any]
) -> None:
    other, copied = tmp_path / "other.txt", tmp_path / "copied.txt"
    other.write_text("Other words, and more of them. " * 40)
    shutil.copy(text_file, copied)
    sampling = {"seq_len": 32, "samples": 3}
    hf.oneshot("demo", text_file, tmp_path / "out", recipe="paper", prune_ratio=0.1, **sampling)

    def said(text: Path, *flags: Any) -> str:
        run = hfprune("evaluate", "demo", tmp_path / "out", "--text", text, "--seq-len", 32, *flags)
        assert run.code == 0, run.err
        return str(run.err)

    assert f"text.txt {WARNING}" in said(text_file, "--samples", 5)  # other windows, by its name
    assert f"copied.txt {WARNING}" in said(copied, "--samples", 3)  # the same windows
    assert WARNING not in said(other, "--samples", 3)
    record = tmp_path / "out" / "hfprune.json"
    for damaged in (json.dumps({"provenance": {"calibration": 3}}), "[]", "not JSON"):
        record.write_text(damaged)
        assert WARNING not in said(text_file, "--samples", 3)
