"""Every kernel compiles for every architecture without a fault, and the check sees faults.

Compilation needs processes of its own: in this one the kernels may be interpreted.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import aot

ROOT = Path(__file__).parents[2]
AOT = ROOT / "tools" / "aot.py"
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx942"}
PREAMBLE = f"""
import json, sys
from functools import partial
from itertools import product
from unittest import mock
import torch
sys.path.insert(0, {str(AOT.parent)!r})
import aot
from hfprune_fast import kernels
from hfprune_fast.kernels import (
    _kl_rows_triton, _rms_norm_triton, _rotary_triton, _rows, _rows_triton, _statistics_triton,
)
bf16 = torch.bfloat16
"""


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, "-P", *map(str, command)],
        env=inherited | environment, capture_output=True, text=True,
    )  # fmt: skip


def run_code(code: str, folder: Path) -> Any:
    """The JSON that code prints last; `aot` and the kernels are imported."""
    done = run("-c", PREAMBLE + code, TRITON_CACHE_DIR=str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kernels_in_the_sources() -> set[str]:
    """Functions under @jit that no other function calls: those that are launched."""
    jitted, called = set(), set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                    jitted.add(node.name)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
    return jitted - called


@pytest.mark.slow
def test_every_kernel_compiles_everywhere_without_a_fault(tmp_path: Path) -> None:
    done = run(AOT, "--in-turn", "--json", tmp_path / "reports.json", HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    reports = json.loads((tmp_path / "reports.json").read_text())
    kernels = kernels_in_the_sources()
    assert {(r["kernel"], r["arch"]) for r in reports} == {
        (kernel, arch) for kernel in kernels for arch in ARCHITECTURES
    }
    assert all(r["registers"] > 0 for r in reports if r["arch"] != "gfx942")
    assert all(r["spills"] == 0 and not r["faults"] for r in reports)
    assert done.stdout.splitlines()[-1].endswith(f"of {len(kernels)} kernels, 0 faults")
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_every_shipped_configuration_is_reached(tmp_path: Path) -> None:
    code = """
used = []
for case, arch in product(aot.CASES, aot.TARGETS):
    for launch in aot.record(case.launch, arch):
        names = launch.kernel.arg_names
        constants = {names[i]: value for (i,), value in launch.constants.items()}
        used.append([launch.kernel.__name__, constants | launch.options.__dict__])
tables = [
    value for module in (_rows_triton, _kl_rows_triton, _statistics_triton)
    for name, value in vars(module).items() if "CONFIG" in name
]
# Those of norms and rotary embeddings follow from sizes: of models' hidden sizes and heads.
widths = [64, 96, 128, 192, 256, 512, 896, 1024, 2048, 4096, 5120, 7168, 8192, 12_288, 16_384]
for arch in ("sm_90", "gfx942"):
    with mock.patch.object(aot._dispatch, "architecture", return_value=arch):
        tables += [_rms_norm_triton._configuration(width, None) for width in (*widths, 18_432)]
tables += [
    _rotary_triton._configuration(heads, width)
    for heads in (1, 2, 4, 8, 16, 32, 40, 64, 128) for width in (64, 80, 96, 128, 256)
]
print(json.dumps([tables, used], default=str))
"""

    def configurations(table: dict[str, Any]) -> list[dict[str, Any]]:
        if "num_warps" in table:
            return [table]
        return [one for inner in table.values() for one in configurations(inner)]

    tables, used = run_code(code, tmp_path)
    shipped = [one for table in tables for one in configurations(table)]
    assert len(shipped) >= len(kernels_in_the_sources())
    for configuration in shipped:
        assert any(configuration.items() <= constants.items() for _, constants in used), (
            configuration
        )


@pytest.mark.slow
def test_what_is_compiled_is_what_real_tensors_launch(tmp_path: Path) -> None:
    """Argument types and divisibility: of the cases, and of the operations on real tensors."""
    code = """
def rows(*shape):
    return torch.zeros(shape, dtype=bf16)

g, gate, up = (rows(2, 256, 32) for _ in range(3))
odd = [rows(2, 256, 33) for _ in range(3)]
mask = torch.ones(2, 256, dtype=torch.bool)
real = [
    ("bf16 forward", lambda: kernels.softmax_entropy(rows(4, 96))),
    ("bf16 gradient in place", lambda: kernels.softmax_entropy_grad_(rows(4, 96), torch.ones(4))),
    ("bf16 odd V", lambda: kernels.linear_entropy(rows(4, 32), rows(33, 32))),
    ("bf16 kl odd V", lambda: kernels.linear_kl(*(2 * (rows(4, 32), rows(33, 32))))),
    ("bf16 token_mask", lambda: kernels.taylor_statistics(g, gate, token_mask=mask)),
    ("bf16 gated silu", lambda: kernels.gated_taylor(g, gate, up, overwrite=True)),
    ("bf16 gated silu fused",
     lambda: kernels.gated_taylor(g, *rows(2, 256, 64).chunk(2, dim=2), overwrite=True)),
    ("bf16 gated silu odd F", lambda: kernels.gated_taylor(*odd)),
    ("bf16 norm", lambda: kernels.rms_norm(rows(16, 4096), rows(4096), eps=1e-5)),
    ("norm of 128", lambda: kernels.rms_norm(rows(2, 8, 4, 128), rows(128), eps=1e-5)),
    ("bf16 rotary", lambda: torch.ops.hfprune_fast.rotary(
        rows(2, 16, 32, 128).transpose(1, 2), rows(1, 16, 128), rows(1, 16, 128), False, None)),
]

def known(launch):
    names = launch.kernel.arg_names
    divisible = [names[i] for (i,), a in launch.attributes.items() if ["tt.divisibility", 16] in a]
    return [launch.kernel.__name__, launch.signature, sorted(divisible)]

cases = {case.name: case for case in aot.CASES}
print(json.dumps([
    [name, arch, [known(one) for one in aot.record(cases[name].launch, arch)],
     [known(one) for one in aot.record(operation, arch)]]
    for name, operation in real for arch in ("sm_90", "gfx942")
]))
"""
    for name, arch, compiled, launched in run_code(code, tmp_path):
        assert compiled == launched, (name, arch)
        assert compiled, name


@pytest.mark.slow
def test_faults_are_seen(tmp_path: Path) -> None:
    """The kernels hold their bounds above; here a bound below, and a lane that threads share."""
    code = """
found = []

def entropy_rows(stride):
    rows = torch.empty(64, stride, dtype=bf16, device="meta")[:, :32_000]
    scale = torch.empty(64, device="meta")
    _rows.rows_loss_and_grad(rows, scale, rows, softcap=None, logit_scale=1.0, backend=None)

found += [
    aot.check(aot.Case("_rows_kernel", "", partial(entropy_rows, stride)), "sm_90")[0].faults
    for stride in (32_000, 32_001)
]

def faults(name, module, arch, **configuration):
    case = next(case for case in aot.CASES if case.name == name)
    with mock.patch.object(module, "_CONFIGS", dict.fromkeys(("sm", "gfx"), configuration)):
        return [fault for report in aot.check(case, arch) for fault in report.faults]

rows = "bf16 gradient in place", _rows_triton
stages = {"BLOCK_T": 8, "BLOCK_F": 128, "STAGES": 30, "num_warps": 4}
taylor = "bf16 gated silu", _statistics_triton
found += [
    faults(*rows, "sm_90", LANES=8192, num_warps=32),
    faults(*taylor, "sm_80", **stages),
    faults(*taylor, "sm_90", **stages),
    faults(*rows, "sm_90", LANES=1000, num_warps=4),
]

case = next(case for case in aot.CASES if case.name == "bf16 gradient in place")
tight = case._replace(instructions=(15.0, 15.0))
narrow = dict.fromkeys(("sm", "gfx"), {"LANES": 512, "num_warps": 32})
for arch in ("sm_90", "gfx942"):
    (report,) = aot.check(tight, arch)
    found.append([report.instructions, *report.faults])
with mock.patch.object(_rows_triton, "_CONFIGS", narrow):
    found.append(list(aot.check(case, "sm_90")[0].faults))
print(json.dumps(found))
"""
    aligned, narrow, *configured, below, below_too, shared = run_code(code, tmp_path)
    assert aligned == []
    assert "loads in loops are narrower" in narrow[0]
    assert "stores in loops are narrower" in narrow[1]
    spilled, sm_80, sm_90, broken = configured
    assert any(fault.startswith("spills") for fault in spilled)
    assert any("shared memory, more than 166912" in fault for fault in sm_80)
    assert sm_90 == []
    assert len(broken) == 1
    assert broken[0].startswith("does not compile")
    for instructions, fault in (below, below_too):
        assert 15 < instructions < 22.5
        assert "instructions a logit, more than 15.0" in fault
    assert "exchanges between threads in a loop" in shared


def test_refuses_to_run_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["aot.py"])
    monkeypatch.setattr(aot, "INTERPRETED", True)
    with pytest.raises(SystemExit, match=r"^aot\.py: TRITON_INTERPRET is set.*; unset it$"):
        aot.main()
