"""The wheel holds what an installed package needs; built without build isolation, so offline."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from unoptimised import unoptimised_cxx

from hfprune_fast.checkpoint import native

ROOT = Path(__file__).parent.parent


def build_wheel(folder: Path, **environment: str) -> set[str]:
    """Build a wheel of a copy of the tree; return the names of what is in it."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    tree = folder / "tree"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", "*.so"
    )
    shutil.copytree(ROOT, tree, ignore=skipped)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(folder), "."],
        cwd=tree, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    (wheel,) = folder.glob("hfprune_fast-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_wheel_holds_kernels_the_tiny_model_types_and_the_extension(tmp_path: Path) -> None:
    names = build_wheel(tmp_path, **unoptimised_cxx(tmp_path))
    package = ROOT / "hfprune_fast"
    for path in (*package.rglob("*.py"), *(package / "tiny").iterdir()):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "kernels").glob("*.py"):
        assert f"hfprune_fast/kernels/{path.name}" in names
    assert {f"hfprune_fast/{name}" for name in ("py.typed", "_C.pyi", "report/page.css")} <= names
    assert not any(name.startswith(("kernels/", "tests/", "bench/", "csrc/")) for name in names)
    if native.UNUSED_REASON is None:
        assert any(name.startswith("hfprune_fast/_C.") and ".so" in name for name in names)


@pytest.mark.slow
def test_installs_without_a_compiler_unless_the_extension_is_required(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = build_wheel(tmp_path, CXX="/nowhere/c++")
    assert "hfprune_fast/checkpoint/native.py" in names
    assert not any(name.endswith(".so") for name in names)
    (tmp_path / "again").mkdir()
    with pytest.raises(subprocess.CalledProcessError):
        build_wheel(tmp_path / "again", CXX="/nowhere/c++", HFPRUNE_REQUIRE_NATIVE="1")
    assert "/nowhere/c++" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_without_the_extension_all_works_and_says_so(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "hfprune_fast", "prune", "demo", "--calibration", "demo"),
        *("--samples", "2", "--seq-len", "32", "--prune-ratio", "0.2", "--out", "out", "--verify"),
    ]
    environment = {**os.environ, "HFPRUNE_NATIVE": "0"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (
        "weights are moved by plain torch, slower: the C++ extension is not in use" in done.stderr
    )
    assert (tmp_path / "out" / "model.safetensors").exists()
