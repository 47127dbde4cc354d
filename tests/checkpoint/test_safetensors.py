"""Safetensors files: hostile ones are refused in one line, good ones make the round trip."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hfprune_fast.checkpoint import native
from hfprune_fast.checkpoint.safetensors import SafetensorsFile, SafetensorsWriter
from hfprune_fast.errors import CheckpointError


@pytest.fixture(params=["plain", *(["extension"] if native._C else [])])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the extension and without it."""
    if request.param == "plain":
        monkeypatch.setattr(native, "_C", None)
    return str(request.param)


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(name: str, *of: Any, data: bytes = b"", **more: Any) -> bytes:
    return raw_file({name: entry(*of) | more}, data)


U8 = json.dumps(entry("U8", [1], 0, 1)).encode()
DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE = {
    "empty": (b"", "header too small"),
    "7 bytes": (b"1234567", "header too small"),
    "length of 2^64 - 1": (struct.pack("<Q", 2**64 - 1), "header too large"),
    "length above the format's limit": (struct.pack("<Q", 100_000_001), "header too large"),
    "length behind the end": (struct.pack("<Q", 9) + b"{}", "invalid header length"),
    "no header": (raw_file(b""), "invalid JSON"),
    "many openings": (raw_file(b"{" * 100_000), "key must be a string"),
    "deep": (raw_file(b'{"a":' * 100_000), "recursion limit"),
    "deep in an unknown key": (raw_file(U8[:-1].join((b'{"a":', b',"x":' + DEEP + b"}}"))), ""),
    "text behind": (raw_file(b"{} x"), "trailing characters"),
    "NUL behind": (raw_file(b"{}\0"), "trailing characters"),
    "byte order mark": (raw_file(b"\xef\xbb\xbf{}"), "expected value"),
    "UTF-16": (raw_file("{}".encode("utf-16")), "UTF-8"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "UTF-8"),
    "overlong UTF-8": (raw_file(b'{"\xc0\xaf":1}'), "UTF-8"),
    "surrogate in UTF-8": (raw_file(b'{"\xed\xa0\x80":' + U8 + b"}", b"1"), "UTF-8"),
    "half a surrogate pair": (raw_file(b'{"\\ud800":' + U8 + b"}", b"1"), "hex escape"),
    "number for an entry": (raw_file({"a": 1}), "TensorInfo"),
    "list for an entry": (raw_file({"a": ["U8", [1], [0, 1]]}, b"1"), "invalid entry for 'a'"),
    "empty entry": (raw_file({"a": {}}), "missing field"),
    "map for a dtype": (one("a", {"U8": None}, [1], 0, 1, data=b"1"), "invalid entry for 'a'"),
    "unknown dtype": (one("a", "F9", [1], 0, 4, data=b"1234"), "unknown variant `F9`"),
    "half a byte": (one("a", "F4", [3], 0, 1, data=b"1"), "byte boundary"),
    "truncated": (one("a", "F32", [1], 0, 4, data=b"123"), "not fully covered"),
    "bytes behind the last": (one("a", "F32", [1], 0, 4, data=b"12345"), "not fully covered"),
    "data of no tensor": (raw_file({}, b"1"), "not fully covered"),
    "too few bytes": (one("a", "F32", [2], 0, 4, data=b"1234"), "invalid shape"),
    "shape that overflows": (one("a", "F32", [2**62, 4], 0, 4, data=b"1234"), "overflow"),
    "shape that wraps to 0": (one("a", "F32", [2**62, 4], 0, 0), "overflow"),
    "2^64 items": (one("a", "F32", [2**64, 0], 0, 0), "expected usize"),
    "2^63 times none": (one("a", "F32", [2**63, 0], 0, 0), "larger than memory"),
    "2^61 times none": (one("a", "F32", [2**61, 0], 0, 0), "larger than memory"),
    "negative size": (one("a", "F32", [-1], 0, 4, data=b"1234"), "expected usize"),
    "fraction": (one("a", "F32", [1.0], 0, 4, data=b"1234"), "expected usize"),
    "NaN": (one("a", "F32", [float("nan")], 0, 4, data=b"1234"), "expected value"),
    "negative offset": (one("a", "F32", [1], -4, 0, data=b"1234"), "expected usize"),
    "text for an offset": (one("a", "U8", [1], "0", "1", data=b"1"), "expected usize"),
    "one offset": (one("a", "U8", [0], 0, 0, data_offsets=[0]), "invalid length 1"),
    "three offsets": (one("a", "U8", [0], 0, 0, data_offsets=[0, 0, 0]), "invalid length 3"),
    "end before its begin": (one("a", "F32", [1], 4, 0, data=b"1234"), "tensor `a`"),
    "overlap": (
        raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"), "tensor `b`",
    ),
    "hole": (
        raw_file({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"), "tensor `b`",
    ),
    "hole at the start": (one("a", "U8", [1], 1, 2, data=b"12"), "tensor `a`"),
    "two of a name": (raw_file(b'{"a":' + U8 + b',"a":' + U8 + b"}", b"1"), "two entries for 'a'"),
    "two dtypes": (raw_file(b'{"a":{"dtype":"U8",' + U8[1:] + b"}", b"1"), "duplicate field"),
    "metadata twice": (raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate field"),
    "two of a key": (raw_file(b'{"__metadata__":{"k":"","k":""}}'), "two entries for 'k'"),
    "number in the metadata": (raw_file({"__metadata__": {"k": 1}}), "expected a string"),
    "list for metadata": (raw_file({"__metadata__": []}), "expected a map"),
    "huge number": (raw_file(U8[:-1].join((b'{"a":', b',"x":' + b"9" * 5000 + b"}}")), b"1"), ""),
    "control characters": (one("a\x1b[31m\x9b\n", "U8", [1], 1, 2, data=b"12"), r"`a\\x1b\[31m"),
    "long name": (one("n" * 100_000, "U8", [1], 1, 2, data=b"12"), "tensor `nnn"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    (tmp_path / "f").write_bytes(content)
    expected = rf"/f is truncated or not a safetensors file: .*{message}.*; download it again$"
    with pytest.raises(CheckpointError, match=expected) as raised:
        SafetensorsFile(tmp_path / "f")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


HARMLESS = {
    "nothing": (raw_file(b"{}"), {}),
    "spaces": (raw_file(b" {} \n"), {}),
    "no metadata": (raw_file({"__metadata__": None}), {}),
    "unknown key": (one("a", "U8", [1], 0, 1, data=b"1", x=[{}]), {"a": b"1"}),
    "unaligned": (one("ab", "F32", [1], 0, 4, data=b"1234"), {"ab": b"1234"}),
    "scalar": (one("a", "F32", [], 0, 4, data=b"1234"), {"a": b"1234"}),
    "8-bit floats": (one("a", "F8_E4M3", [1], 0, 1, data=b"1"), {"a": b"1"}),
    "4-bit floats": (one("a", "F4", [2], 0, 1, data=b"1"), {"a": b"1"}),
    "no name": (one("", "U8", [1], 0, 1, data=b"1"), {"": b"1"}),
    "control characters": (one("\x1b\0\n", "U8", [1], 0, 1, data=b"1"), {"\x1b\0\n": b"1"}),
    "no items": (
        raw_file({"y": entry("I64", [0], 1, 1), "z": entry("F32", [0, 7], 0, 0),
                  "a": entry("U8", [1], 0, 1)}, b"1"), {"z": b"", "a": b"1", "y": b""},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_odd_but_harmless_file(tmp_path: Path, name: str) -> None:
    content, tensors = HARMLESS[name]
    (tmp_path / "f").write_bytes(content)
    file = SafetensorsFile(tmp_path / "f")
    assert {name: bytes(file.data(name)) for name in file.tensors} == tensors
    assert list(file.tensors) == list(tensors)  # in the order of the data
    for name in tensors:
        file.release(name)
        assert bytes(file.data(name, prefetch=False)) == tensors[name]


def test_mutated_files_are_read_as_the_library_reads_them_or_refused(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "valid", {"format": "pt"})
    valid = (tmp_path / "valid").read_bytes()
    end = 8 + int.from_bytes(valid[:8], "little")
    generator, accepted, refused = random.Random(0), 0, 0
    file = tmp_path / "mutant"
    for _ in range(1500):
        content = bytearray(valid)
        for _ in range(generator.choice((1, 1, 2, 5))):
            at, other, kind = (
                generator.randrange(end),
                generator.randrange(8, end),
                generator.random(),
            )
            if kind < 0.3:
                content[at] ^= 1 << generator.randrange(8)
            elif kind < 0.6:
                content[at] = generator.choice(b'{}[]",:0123456789 \\ u')
            else:
                content[at], content[other] = content[other], content[at]
        file.write_bytes(content[: generator.choice((end // 2, *[len(content)] * 4))])
        try:
            with safe_open(file, framework="pt") as opened:
                theirs = {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            theirs = None
        try:
            ours = {k: v[1] for k, v in SafetensorsFile(file).tensors.items()}
        except CheckpointError as error:
            ours, reason = None, str(error)
        if ours is None:
            refused += 1
            assert theirs is None or "two entries" in reason or "larger than memory" in reason
        else:
            accepted += 1
            assert ours == theirs
    assert min(accepted, refused) > 50


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(CheckpointError, match=rf"^{place} "):
            SafetensorsFile(place)


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
        'quo"te\\é😀': torch.arange(5.0),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "ints": torch.arange(3),
    }


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "f", {"format": "pt", "ключ": "значение"})
    file = SafetensorsFile(tmp_path / "f")
    assert file.metadata == {"format": "pt", "ключ": "значение"}
    assert file.tensors.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert file.tensors[name][1] == tuple(tensor.shape)
        assert bytes(file.data(name)) == bits_of(tensor).tobytes()
        assert file.data(name).readonly


def bits_of(tensor: torch.Tensor) -> Any:
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return flat.view(f"u{tensor.itemsize}").reshape(tensor.shape)


def test_writes_what_the_library_reads(path: str, tmp_path: Path) -> None:
    keep = np.array([0, 2])
    cuts = {"a": (0, (2, 4)), "b": (1, (4, 2)), "c": (0, (2,))}
    whole = {
        "a": torch.randn(3, 4).bfloat16(), "b": torch.randn(4, 3), "c": torch.randn(3).half(),
        "d": torch.randn(3, 2, 2).double(), "é": torch.zeros(0, 2), "s": torch.tensor(1.0),
    }  # fmt: skip
    dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    entries = [
        (name, dtypes.get(t.dtype, "F32"), cuts[name][1] if name in cuts else tuple(t.shape))
        for name, t in whole.items()
    ]
    with SafetensorsWriter(tmp_path / "f", {"k": "v", "a": "ü"}, entries) as writer:
        for name in reversed(whole):
            cut = {"axis": cuts[name][0], "keep": keep} if name in cuts else {}
            assert writer.write(name, bits_of(whole[name]), **cut)
        for name, wrong, cut in (
            ("a", bits_of(whole["a"]), {}),
            ("a", bits_of(whole["b"]), {"axis": 1, "keep": keep}),
            ("c", bits_of(whole["c"]), {"keep": keep[:1]}),
            ("c", np.zeros(2, "u4"), {}),
        ):
            with pytest.raises(ValueError, match=f"tensor {name} must be"):
                writer.write(name, wrong, **cut)
    read = load_file(tmp_path / "f")
    for name, tensor in whole.items():
        if name in cuts:
            tensor = tensor.index_select(cuts[name][0], torch.from_numpy(keep))
        assert torch.equal(read[name], tensor), name
    content = (tmp_path / "f").read_bytes()
    assert content[8:].startswith('{"__metadata__":{"a":"ü","k":"v"},"a":{"dtype":'.encode())
    assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "f", None, [])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SafetensorsWriter(tmp_path / "nowhere" / "f", None, [])


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "F64"), (torch.float32, "F32"), (torch.bfloat16, "BF16"),
     (torch.float16, "F16")],
)  # fmt: skip
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_reports_what_is_not_finite(
    path: str, tmp_path: Path, dtype: torch.dtype, name: str, bad: float
) -> None:
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    poisoned = largest.clone()
    poisoned[1, 3] = bad
    entries = [("whole", name, (3, 5)), ("cut", name, (3, 4))]
    with SafetensorsWriter(tmp_path / "f", None, entries) as writer:
        assert writer.write("whole", bits_of(largest))
        assert not writer.write("whole", bits_of(poisoned))
        for kept, finite in (([0, 1, 2, 4], True), ([0, 1, 2, 3], False)):
            assert writer.write("cut", bits_of(poisoned), axis=1, keep=np.array(kept)) is finite


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        def allocate(*_: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", allocate)

    refuse(28)
    with pytest.raises(OSError, match="No space left"):
        SafetensorsWriter(tmp_path / "f", None, [])
    refuse(95)  # a file system that cannot allocate
    with SafetensorsWriter(tmp_path / "g", None, [("a", "F32", (1,))]) as writer:
        assert writer.write("a", np.ones(1, "u4"))
    assert SafetensorsFile(tmp_path / "g").tensors["a"][:2] == ("F32", (1,))
