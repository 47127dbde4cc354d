"""What a compiler made of a kernel: registers, spills, loads and stores, and its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What NVIDIA's own tool says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory)."""
    usage = _cuobjdump(cubin, "-res-usage")
    registers, stack, local = (
        int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


_ACCESS = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s")
_COPY = re.compile(r"\bcp\.async\.\S*global .*?\], (\w+)")


def access_bytes(ptx: str, *, looped: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes a thread moves by each load from global memory in a loop, and by each store there.

    Loops are the hot path of most kernels like ours. The rest is done once a program: a pipeline's
    first loads, a row's masked end, a program's sums. A loop is what lies between a label and a
    jump back to it. Without `looped`, all that the kernel does counts.
    """
    lines = ptx.splitlines()
    starts = {line.partition(":")[0]: i for i, line in enumerate(lines) if line[:5] == "$L__B"}
    looped_lines: set[int] = set()
    for i, line in enumerate(lines):
        if found := re.search(r"\bbra\S*\s+(\$L__B\w+)", line):
            looped_lines.update(range(starts[found[1]], i))
    if not looped:
        looped_lines = set(range(len(lines)))
    accesses: dict[str, list[int]] = {"ld": [], "st": []}
    for line in (lines[i] for i in sorted(looped_lines)):
        if found := _ACCESS.search(line):
            accesses[found[1]].append(int(found[2] or 1) * int(found[3]) // 8)
        elif found := _COPY.search(line):
            accesses["ld"].append(int(found[1], 0))
    return tuple(accesses["ld"]), tuple(accesses["st"])


class Loop(NamedTuple):
    """A loop that loads from global memory."""

    instructions: int
    load_bytes: int  # a thread's
    exchanges: int  # instructions by which threads wait for each other or swap registers


_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);")
_SASS_JUMP = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)")
_GCN_JUMP = re.compile(r"s_c?branch\S*\s+(\.LBB\w+)")
_BYTES = {"128": 16, "64": 8, "U16": 2, "U8": 1}
_WORDS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "ubyte": 1}
_EXCHANGE = re.compile(r"\bBAR\b|\bSHFL\b|\bs_barrier\b|\bds_\w+|_dpp\b|_permlane")


def loops(assembly: dict[str, Any]) -> tuple[Loop, ...]:
    """The innermost loops of NVIDIA's or AMD's code that load from global memory.

    A loop is what lies between an instruction and a jump back to it.
    """
    if "cubin" in assembly:
        found = _SASS.findall(_cuobjdump(assembly["cubin"], "-sass"))
        code = [text for _, text in found]
        places = {int(address, 16): i for i, (address, _) in enumerate(found)}
        jumps = [(i, _SASS_JUMP.search(text)) for i, text in enumerate(code)]
        targets = [(i, places[int(jump[1], 16)]) for i, jump in jumps if jump]
    else:
        lines = [line.partition(";")[0].strip() for line in assembly["amdgcn"].splitlines()]
        places_of = {line[:-1]: i for i, line in enumerate(lines) if line[:4] == ".LBB"}
        code = ["" if line[-1:] == ":" or line[:1] == "." else line for line in lines]
        branches = [(i, _GCN_JUMP.match(line)) for i, line in enumerate(lines)]
        targets = [(i, places_of[jump[1]]) for i, jump in branches if jump]
    spans = [(start, end) for end, start in targets if start < end]
    made = []
    for start, end in spans:
        if any((start, end) != (a, b) and start <= a and b <= end for a, b in spans):
            continue
        body = [line for line in code[start : end + 1] if line]
        loaded = sum(map(_load_bytes, body))
        if loaded:
            made.append(Loop(len(body), loaded, sum(bool(_EXCHANGE.search(x)) for x in body)))
    return tuple(made)


def _load_bytes(instruction: str) -> int:
    """Bytes that an instruction loads from global memory for a thread."""
    if found := re.search(r"\bLDG(?:STS)?((?:\.\w+)*)", instruction):
        sizes = [_BYTES[part] for part in found[1].split(".") if part in _BYTES]
        return sizes[0] if sizes else 4
    if found := re.search(r"\b(?:global|buffer)_load_(?:lds_)?(\w+)", instruction):
        return _WORDS.get(found[1], 2)
    return 0
