"""What a compiler made of a kernel: registers, spills, and the width of its loads and stores."""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory), by NVIDIA's own tool."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (
        int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s")
_COPY = re.compile(r"\bcp\.async\.\S*global .*?\], (\w+)")


def access_bytes(ptx: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes a thread moves by each load from global memory in a loop, and by each store there.

    Loops are the hot path of kernels like ours. The rest is done once a program: a pipeline's first
    loads, a row's masked end, a program's sums. A loop is what lies between a label and a jump back
    to it.
    """
    lines = ptx.splitlines()
    starts = {line.partition(":")[0]: i for i, line in enumerate(lines) if line[:5] == "$L__B"}
    looped: set[int] = set()
    for i, line in enumerate(lines):
        if found := re.search(r"\bbra\S*\s+(\$L__B\w+)", line):
            looped.update(range(starts[found[1]], i))
    accesses: dict[str, list[int]] = {"ld": [], "st": []}
    for line in (lines[i] for i in sorted(looped)):
        if found := _ACCESS.search(line):
            accesses[found[1]].append(int(found[2] or 1) * int(found[3]) // 8)
        elif found := _COPY.search(line):
            accesses["ld"].append(int(found[1], 0))
    return tuple(accesses["ld"]), tuple(accesses["st"])
