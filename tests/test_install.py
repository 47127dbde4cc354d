"""The wheel holds what an installed package needs; built without build isolation, so offline."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel_holds_kernels_the_tiny_model_and_types(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, tree, ignore=skipped)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), "."],
        cwd=tree, check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("hfprune_fast-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [
        *(ROOT / "hfprune_fast").glob("*.py"),
        *(ROOT / "hfprune_fast" / "tiny").iterdir(),
    ]:
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "kernels").glob("*.py"):
        assert f"hfprune_fast/kernels/{path.name}" in names
    assert "hfprune_fast/py.typed" in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/", "csrc/")) for name in names)
