"""The C++ sources under sanitizers, against a byte-by-byte reference."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(command: list[str | Path], timeout_s: float) -> str:
    """What `command` prints; fails the test with the tail of it unless it exits with 0."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        env=os.environ | {"PATH": PATH},
    )
    if result.returncode != 0:
        pytest.fail(f"{command[0]} exited with {result.returncode}:\n{result.stdout[-4000:]}")
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "flags", "least"),
    [
        # Optimised, the kernels take a minute more to compile.
        ("address,undefined", ["-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O0"], 7000),
        # Which thread has which rows does not depend on the instruction set.
        (
            "thread",
            ["-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1", "-DHFPRUNE_AVX2=0", "-DHFPRUNE_AVX512=0"],
            70,
        ),
    ],
    ids=["address,undefined", "thread"],
)
def test_native_code_under_sanitizers(
    sanitizers: str, flags: list[str], least: int, tmp_path: Path
) -> None:
    cmake = shutil.which("cmake", path=PATH)
    if cmake is None:
        pytest.skip("no cmake")
    if not any(shutil.which(name, path=PATH) for name in (os.environ.get("CXX"), "c++") if name):
        pytest.skip("no C++ compiler")
    build = tmp_path / "build"
    configure = [cmake, "-S", REPOSITORY / "csrc", "-B", build, "-DHFPRUNE_CHECKS=ON"]
    configure += [f"-DHFPRUNE_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", *flags]
    if shutil.which("ninja", path=PATH):
        configure += ["-G", "Ninja"]
    run(configure, timeout_s=60)
    run([cmake, "--build", build, "--parallel", "2"], timeout_s=200)

    printed = run([build / "check", tmp_path], timeout_s=200)
    cases = re.search(r"^(\d+) cases agree", printed, re.MULTILINE)
    assert cases is not None, printed
    assert int(cases[1]) >= least
