"""A C++ compiler that is quick, for builds of which nothing is timed."""

import os
import shutil
from pathlib import Path


def unoptimised_cxx(folder: Path) -> dict[str, str]:
    """Return the environment's CXX for a build: the compiler with -O0, the last of such flags."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        return {}
    wrapper = folder / "c++-unoptimised"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    wrapper.chmod(0o755)
    return {"CXX": str(wrapper)}
