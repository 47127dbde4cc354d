"""tools/tiny_corpus.py: a corpus that is whole or refused."""

import sysconfig
from pathlib import Path

import pytest
from tiny_corpus import gather


def test_a_package_whose_sources_are_elsewhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"stdlib": str(tmp_path), "purelib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    with pytest.raises(SystemExit, match=r"huggingface_hub: expected its sources in .*, got none"):
        gather()
