"""What a compiler made of a kernel: registers, spills, and the width of its loads and stores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import triton


def resources(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of stack and local memory, disassembly), by NVIDIA's own tools."""

    def output(tool: Any, option: str) -> str:
        command = [tool.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output(triton.knobs.nvidia.cuobjdump, "-res-usage")
        assembly = output(triton.knobs.nvidia.nvdisasm, "-c")
    registers, stack, local = (
        int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, assembly


_LABEL = re.compile(r"(\.L_x_\w+):")
_TARGET = re.compile(r"\.L_x_\w+\b(?!:)")
_NO_FALL_THROUGH = re.compile(r"\*/\s+(?:BRA\s+`|EXIT|RET)")


def in_loops(assembly: str) -> Iterator[str]:
    """The instructions that can run more than once: the hot path of kernels like ours.

    The rest is done once a program: a pipeline's first loads, a row's masked end, a program's sums.
    A block of instructions is in a loop if it can be reached from itself. Order in the text says
    little, as compilers move blocks.
    """
    blocks = [[""]]
    for line in assembly.splitlines():
        code, last = line.partition(";")[0], blocks[-1][-1]  # a comment or nothing after ";"
        if _LABEL.match(code) or _TARGET.search(last) or _NO_FALL_THROUGH.search(last):
            blocks.append([])
        blocks[-1].append(code)
    starts = {found[1]: i for i, block in enumerate(blocks) if (found := _LABEL.match(block[0]))}
    followers: list[set[int]] = [set() for _ in range(len(blocks) + 1)]
    for i, block in enumerate(blocks):
        followers[i] = {starts[name] for name in _TARGET.findall(block[-1]) if name in starts}
        if not _NO_FALL_THROUGH.search(block[-1]):
            followers[i].add(i + 1)
    for i, block in enumerate(blocks):
        reached: set[int] = set()
        ahead = [i]
        while ahead:
            new = followers[ahead.pop()] - reached
            reached |= new
            ahead += new
        if i in reached:
            yield from block


_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)\s")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def access_bytes(instructions: Iterator[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes a thread moves by each load from global memory, and by each store to it."""
    loads: list[int] = []
    stores: list[int] = []
    for line in instructions:
        if found := _ACCESS.search(line):
            sizes = (_BYTES[suffix] for suffix in found[2].split(".") if suffix in _BYTES)
            (stores if found[1] == "STG" else loads).append(next(sizes, 4))
    return tuple(loads), tuple(stores)
