"""Who may import whom (the picture is in CONTRIBUTING.md), and what must never be importable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hfprune_fast"

# Each room imports only rooms to the right of it; kernels and models stand apart from the rest.
LAYERS = [
    {"__main__"},
    {"__init__", "cli"},
    {"commands"},
    {"recovery"},  # which writes by pruning's writer
    {"pruning"},
    {"report"},
    {"scoring", "evaluation"},
    {"engine"},
    {"checkpoint", "data"},
    {"models"},
    {"config", "console", "exit_codes"},
    {"options"},
    {"errors", "_version"},
]
CALLS_KERNELS = {"config", "checkpoint", "commands", "scoring", "engine", "recovery", "evaluation"}


def room_of(path: Path) -> str:
    place = path.relative_to(PACKAGE)
    return place.parts[0] if len(place.parts) > 1 else place.stem


def imports(path: Path) -> set[str]:
    """Rooms of this package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hfprune_fast"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] for name in names if name[0] == "hfprune_fast" and name[1:]}
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


FILES = [path for path in PACKAGE.rglob("*.py") if room_of(path) != "kernels"]
FLOORS = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    room, imported = room_of(path), imports(path)
    assert "kernels" not in imported or room in CALLS_KERNELS
    assert "_C" not in imported or path == PACKAGE / "checkpoint" / "native.py"
    for other in imported - {room, "kernels", "_C"}:
        assert FLOORS[other] > FLOORS[room], other


def test_kernels_import_torch_triton_and_each_other() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert imports(path) <= ({"kernels", "_C"} if path.name == "_cpp.py" else {"kernels"}), path
        others = {name.split(".")[0] for name in imported_names(path)} - sys.stdlib_module_names
        assert others <= {"hfprune_fast", "torch", "triton"}, path


def test_what_is_copied_into_checkpoints_imports_only_transformers() -> None:
    others = imported_names(PACKAGE / "models" / "nonuniform.py") - sys.stdlib_module_names
    assert others == {"transformers"}


def test_only_one_module_imports_triton() -> None:
    importers = [
        path.name
        for path in [*FILES, *(ROOT / "kernels").glob("*.py")]
        if any(name.split(".")[0] == "triton" for name in imported_names(path))
    ]
    assert importers == ["_triton.py"]


def test_three_files_intercept_modules() -> None:
    hooks = re.compile(r"register_\w*hook|\.forward = ")
    files = [path.name for path in FILES if hooks.search(path.read_text(encoding="utf-8"))]
    assert sorted(files) == ["expert_hooks.py", "fused.py", "mlp_hooks.py"]


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_runs_without_triton(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # import triton now raises ImportError
import torch, hfprune_fast as hf
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.kernels._triton import TRITON_VERSION
assert TRITON_VERSION is None
t = torch.ones(1, 2, 3)
hf.kernels.gated_taylor(t, t, t)
hf.kernels.softmax_entropy(t[0])
model = load_model(TINY_MODEL, device="cpu")
table = hf.score(model, torch.arange(64).view(2, 32))
assert table.provenance["versions"]["triton"] is None
hf.prune(model, hf.select(table, prune_ratio=0.5))
print(hf.evaluate(model, model, [torch.arange(8)[None]]).kl_nats)
"""
    assert run(code, tmp_path) == "0.0"


def test_importing_is_light_and_takes_no_others_name(tmp_path: Path) -> None:
    """`hfprune --help` must not wait for model code, and plain `kernels` is not ours.

    Only transformers' light part is imported: AutoConfig, with which config classes are registered;
    of vLLM nothing, also by the module that it finds its plugin in.
    """
    code = """
import importlib.util, sys, hfprune_fast.cli, hfprune_fast.kernels
print({"transformers.modeling_utils", "transformers.generation.utils"} & sys.modules.keys())
models = [name.split(".") for name in sys.modules if name.startswith("transformers.models.")]
print({name[2] for name in models})
spec = importlib.util.find_spec("kernels")
import hfprune_fast.models.vllm_models
print("vllm" in sys.modules)
print(spec.origin if spec else None)
"""
    modules, models, vllm, kernels = run(code, tmp_path).splitlines()
    assert (modules, models, vllm) == ("set()", "{'auto'}", "False")
    assert kernels == "None" or "hfprune" not in kernels


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    rooms = ("hfprune_fast", "kernels", "bench", "tools")
    lengths = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8").count("\n")
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
    }
    assert {str(path): length for path, length in lengths.items() if length > 300} == {}
