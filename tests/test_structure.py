"""Who may import whom (the picture is in CONTRIBUTING.md), and what must never be importable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hfprune_fast"

LEAVES = {
    "native",
    *("obs", "recipe"),
    *("_version", "architectures", "checkpoint", "errors", "forward", "importance", "loading"),
    *("gated_mlp", "output", "planning", "processes", "report", "state", "streaming"),
    *("layouts", "nonuniform", "writing"),
}
STAGES = {"refit", "calibration", "scoring", "selection", "compaction", "evaluation"}
WHOLE_JOB = {"prune_job", "score_job", "pipeline", "demo", "doctor", "cli", "__init__", "__main__"}


def imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything imported from this package, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hfprune_fast"):
            parts = (node.module or "").split(".")
            for alias in node.names:
                found.add((parts[1], alias.name) if len(parts) > 1 else (alias.name, ""))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hfprune_fast."):
                    found.add((alias.name.split(".")[1], ""))
    return found


def imported_names(path: Path) -> set[str]:
    """Full names of all modules imported, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_every_module_has_its_place() -> None:
    assert {p.stem for p in PACKAGE.glob("*.py")} == LEAVES | STAGES | WHOLE_JOB


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_one_another(stage: str) -> None:
    allowed = LEAVES | ({"kernels"} if stage == "scoring" else set())
    assert {module for module, _ in imports(PACKAGE / f"{stage}.py")} <= allowed


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_import_only_leaves(leaf: str) -> None:
    others = {"native": {"_C"}, "gated_mlp": {"kernels"}}.get(leaf, set())
    assert {module for module, _ in imports(PACKAGE / f"{leaf}.py")} <= LEAVES | others


def test_only_one_module_imports_the_extension() -> None:
    importers = [path.name for path in PACKAGE.glob("*.py") if ("_C", "") in imports(path)]
    assert importers == ["native.py"]


def test_kernels_import_torch_triton_and_each_other() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert {module for module, _ in imports(path)} <= {"kernels"}, path
        others = {name.split(".")[0] for name in imported_names(path)} - sys.stdlib_module_names
        assert others <= {"hfprune_fast", "torch", "triton"}, path


def test_what_is_copied_into_checkpoints_imports_only_transformers() -> None:
    others = imported_names(PACKAGE / "nonuniform.py") - sys.stdlib_module_names
    assert others == {"transformers"}


def test_only_one_module_imports_triton() -> None:
    importers = [
        path.name
        for path in [*PACKAGE.glob("*.py"), *(ROOT / "kernels").glob("*.py")]
        if any(name.split(".")[0] == "triton" for name in imported_names(path))
    ]
    assert importers == ["_triton.py"]


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_our_kernels_are_not_the_package_of_that_name(tmp_path: Path) -> None:
    code = """
import importlib.util, hfprune_fast.kernels
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)
"""
    origin = run(code, tmp_path)
    assert origin == "None" or "hfprune" not in origin


def test_everything_runs_without_triton(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import torch, hfprune_fast as hf
from hfprune_fast import checkpoint, loading
from hfprune_fast.kernels._triton import TRITON_VERSION
assert TRITON_VERSION is None
t = torch.ones(1, 2, 3)
hf.kernels.gated_taylor(t, t, t)
hf.kernels.softmax_entropy(t[0])
model = loading.load_model(checkpoint.TINY_MODEL, device="cpu")
table = hf.score(model, torch.arange(64).view(2, 32))
assert table.provenance["versions"]["triton"] is None
hf.prune(model, hf.select(table, prune_ratio=0.5))
print(hf.evaluate(model, model, [torch.arange(8)[None]]).kl_nats)
"""
    assert run(code, tmp_path) == "0.0"


def test_importing_is_light(tmp_path: Path) -> None:
    """`hfprune --help` must not wait for transformers."""
    code = "import sys, hfprune_fast.cli; print('transformers' in sys.modules)"
    assert run(code, tmp_path) == "False"
