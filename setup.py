"""Builds hfprune_fast._C from csrc/ with CMake and Ninja; all else is declared in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs all the same, says so, and
does the extension's work in plain torch. HFPRUNE_REQUIRE_NATIVE=1 makes a failed build an error;
HFPRUNE_BUILD_NATIVE=0 leaves it out, where only what the package depends on is wanted.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("HFPRUNE_BUILD_NATIVE") == "0":
            return
        try:
            self._build(ext)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("HFPRUNE_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"\n{'!' * 78}\nhfprune_fast: the C++ extension could not be built ({error}).\n"
                "Plain torch will score on a CPU and move weights, which is slower. To have the\n"
                "extension, install a C++17 compiler and install again; `hfprune doctor` tells\n"
                f"which is in use.\n{'!' * 78}\n",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        import pybind11

        build = Path(self.build_temp) / "cmake"
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        shutil.rmtree(build, ignore_errors=True)  # it remembers a compiler that may be gone
        configure = [
            *("cmake", "-S", str(CSRC), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        # pip installs cmake and ninja beside the interpreter, which need not be on the PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        for command in (configure, ["cmake", "--build", str(build), "--target", "install"]):
            program = shutil.which(command[0], path=path) or command[0]
            subprocess.run([program, *command[1:]], check=True, env={**os.environ, "PATH": path})

    def get_outputs(self) -> list[str]:  # which may not be there
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[
        Extension(
            "hfprune_fast._C",
            sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
            depends=sorted(str(path) for path in [*CSRC.glob("*.h"), CSRC / "CMakeLists.txt"]),
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
