"""The C++ extension and what stands in for it: byte-exact, and the same to whoever calls them."""

import json
import random
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hfprune_fast.checkpoint import native
from hfprune_fast.errors import CheckpointError

EXTENSION = native._C
PATHS = ["plain", *(["extension", "portable"] if EXTENSION else [])]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the extension, with its portable loops, and without it."""
    if request.param == "plain":
        monkeypatch.setattr(native, "_C", None)
    return str(request.param)


def test_the_extension_is_built_where_there_is_a_compiler() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))) or sys.platform == "win32":
        pytest.skip("no C++ compiler")
    assert native.WHY_NOT is None
    assert native.description().startswith("C++ extension")


def keeps(size: int) -> list[Any]:
    generator = np.random.default_rng(size)
    chosen = [np.sort(generator.permutation(size)[: size * p // 100]) for p in (5, 50, 80, 97)]
    return [np.arange(0), np.arange(1), np.arange(size - 1, size), np.arange(size),
            np.arange(0, size, 2), *chosen]  # fmt: skip


def compact(path: str, source: Any, axis: int, keep: Any, in_place: bool, threads: int) -> Any:
    """Call the path on a (R, C) array of unsigned integers; return what it kept."""
    shape = [*source.shape]
    shape[axis] = len(keep)
    if path == "portable":
        out = source if in_place else np.full(shape, 7, source.dtype)
        EXTENSION.compact(
            source.reshape(-1), out.reshape(-1), rows=source.shape[0], columns=source.shape[1],
            item_bytes=source.itemsize, axis=axis, keep=keep, threads=threads, portable=True,
        )  # fmt: skip
        return out.reshape(-1)[: shape[0] * shape[1]].reshape(shape)
    function = (native.compact_rows, native.compact_columns)[axis]
    out = None if in_place else torch.from_numpy(np.full(shape, 7, source.dtype))
    kept = torch.from_numpy(keep)
    return function(torch.from_numpy(source), kept, out=out, threads=threads).numpy()


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "i8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_keeps_what_numpy_takes(path: str, kind: str, axis: int) -> None:
    generator = np.random.default_rng(1)
    for shape in ((1, 1), (3, 7), (13, 129), (200, 333), (1, 40_001), (5001, 3)):
        whole = generator.integers(0, 100, shape).astype(kind)
        for keep in keeps(shape[axis]):
            for in_place in (True, False):
                for offset in (0, 1):  # items, so that rows start anywhere
                    memory = np.zeros(whole.size + 2, kind)
                    source = memory[offset : offset + whole.size].reshape(shape)
                    source[:] = whole
                    got = compact(path, source, axis, keep, in_place, threads=2)
                    assert np.array_equal(got, whole.take(keep, axis)), (shape, len(keep))
                    assert in_place or np.array_equal(source, whole)
                    assert not memory[:offset].any()
                    assert not memory[offset + whole.size :].any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("threads", [1, 2, 4, 16])
def test_several_threads_in_place(path: str, axis: int, threads: int) -> None:
    whole = np.random.default_rng(2).integers(0, 30_000, (1500, 4099)).astype("i2")  # 12 MB
    for keep in keeps(whole.shape[axis])[-3:]:
        got = compact(path, whole.copy(), axis, keep, True, threads)
        assert np.array_equal(got, whole.take(keep, axis))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PATHS), st.sampled_from(["u1", "i2", "i4", "i8"]), st.integers(0, 1),
    st.integers(1, 90), st.integers(1, 200), st.booleans(), st.data(),
)  # fmt: skip
def test_any_shape_and_any_keep(
    path: str, kind: str, axis: int, rows: int, columns: int, in_place: bool, data: st.DataObject
) -> None:
    whole = np.random.default_rng(3).integers(0, 120, (rows, columns)).astype(kind)
    chosen = data.draw(st.sets(st.integers(0, whole.shape[axis] - 1)))
    keep = np.array(sorted(chosen), dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        if path == "plain":
            patch.setattr(native, "_C", None)
        got = compact(path, whole.copy(), axis, keep, in_place, threads=3)
    assert np.array_equal(got, whole.take(keep, axis))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0, 0], "sorted and distinct"),
        ([2, 1], "sorted and distinct"),
        ([-1, 1], "sorted and distinct"),
        ([4], r"in 0\.\.3"),
        ([0.0], "int64"),
        ([[0]], "vector"),
    ],
)
def test_bad_indices(path: str, keep: list[Any], message: str) -> None:
    source = torch.arange(16).view(4, 4)
    for function in (native.compact_rows, native.compact_columns):
        with pytest.raises(ValueError, match=message):
            function(source, torch.tensor(keep))
    assert torch.equal(source, torch.arange(16).view(4, 4))
    if EXTENSION and not any(isinstance(k, float | list) for k in keep):  # it looks for itself
        with pytest.raises(ValueError, match="keep must"):
            EXTENSION.compact(source.numpy(), source.numpy(), rows=4, columns=4, item_bytes=8,
                              axis=0, keep=np.array(keep), threads=1)  # fmt: skip


def test_bad_matrices(path: str) -> None:
    keep = torch.arange(2)
    with pytest.raises(ValueError, match="contiguous"):
        native.compact_rows(torch.zeros(4, 6).T, keep)
    with pytest.raises(ValueError, match="expected a matrix"):
        native.compact_rows(torch.zeros(4), keep)
    for out in (torch.zeros(2, 5), torch.zeros(2, 4).half(), torch.zeros(4, 2).T):
        with pytest.raises(ValueError, match=r"out must be \(2, 4\) torch.float32"):
            native.compact_rows(torch.zeros(3, 4), keep, out=out)
    transposed = torch.arange(12.0).view(3, 4).T
    out = native.compact_columns(transposed, keep, out=torch.zeros(4, 2))
    assert torch.equal(out, transposed[:, :2])


@pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")
def test_the_extension_checks_its_buffers() -> None:
    sizes = {"rows": 4, "columns": 4, "item_bytes": 1, "axis": 0, "threads": 1}
    keep, source = np.arange(2), np.arange(16, dtype="u1")
    for changes, message in (
        ({"rows": 5}, "expected a source of 20 bytes"),
        ({"axis": 2}, "axis must be"),
        ({"columns": 2**62, "item_bytes": 8}, "larger than memory"),
        ({"rows": 2**40, "columns": 2**40}, "larger than memory"),
        ({"keep": np.arange(3, dtype="i4")}, "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            EXTENSION.compact(source, source.copy(), **{"keep": keep, **sizes, **changes})
    with pytest.raises(ValueError, match="room for 8, got 16 and 7"):
        EXTENSION.compact(source, np.zeros(7, "u1"), keep=keep, **sizes)
    memory = np.zeros(20, "u1")
    with pytest.raises(ValueError, match="not overlap"):
        EXTENSION.compact(memory[:16], memory[4:], keep=keep, **sizes)
    with pytest.raises(BufferError):
        EXTENSION.compact(source, bytes(16), keep=keep, **sizes)


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
        'quo"te\\é😀': torch.arange(5.0),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "ints": torch.arange(3),
    }


def test_reads_what_the_formats_library_wrote(path: str, tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "f", {"format": "pt", "ключ": "значение"})
    file = native.SafetensorsFile(tmp_path / "f")
    assert file.metadata == {"format": "pt", "ключ": "значение"}
    assert file.tensors.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert file.tensors[name][1] == tuple(tensor.shape)
        assert bytes(file.data(name)) == tensor.flatten().view(torch.uint8).numpy().tobytes()
        file.done_with(name)
        assert file.data(name).readonly


def test_writes_what_the_formats_library_reads(path: str, tmp_path: Path) -> None:
    keep = np.array([0, 2])
    whole = {
        "a": torch.randn(3, 4).bfloat16(), "b": torch.randn(4, 3), "c": torch.randn(3).half(),
        "d": torch.randn(3, 2, 2).double(), "é": torch.zeros(0, 2), "s": torch.tensor(1.0),
    }  # fmt: skip
    cuts = {"a": (0, (2, 4)), "b": (1, (4, 2)), "c": (0, (2,))}
    dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
    entries = [
        (name, dtypes.get(t.dtype, "F32"), cuts[name][1] if name in cuts else tuple(t.shape))
        for name, t in whole.items()
    ]
    writer = native.new_file(tmp_path / "f", {"k": "v"}, entries)
    for name in reversed(whole):
        source = whole[name].reshape(-1).view(torch.uint8).numpy()
        assert writer.write(name, source, *((cuts[name][0], keep) if name in cuts else ()))
    writer.close()
    read = load_file(tmp_path / "f")
    for name, tensor in whole.items():
        if name in cuts:
            tensor = tensor.index_select(cuts[name][0], torch.from_numpy(keep))
        assert torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "f", framework="pt") as opened:
        assert opened.metadata() == {"k": "v"}
    assert (8 + int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")) % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tells_what_is_not_finite(
    path: str, tmp_path: Path, dtype: torch.dtype, bad: float
) -> None:
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    poisoned = largest.clone()
    poisoned[1, 3] = bad
    name = {8: "F64", 4: "F32"}.get(dtype.itemsize, "BF16" if dtype == torch.bfloat16 else "F16")
    entries = [("w", name, (3, 5)), ("x", name, (3, 5)), ("y", name, (3, 4)), ("z", name, (3, 4))]
    writer = native.new_file(tmp_path / "f", None, entries)
    raw = poisoned.view(-1).view(torch.uint8).numpy()
    assert writer.write("w", largest.view(-1).view(torch.uint8).numpy())
    assert not writer.write("x", raw)
    assert writer.write("y", raw, 1, np.array([0, 1, 2, 4]))  # it was cut out
    assert not writer.write("z", raw, 1, np.array([0, 1, 2, 3]))


@pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")
def test_the_writer_takes_each_tensor_once_and_whole(tmp_path: Path) -> None:
    writer = EXTENSION.Writer(tmp_path / "f", None, [("a", "F32", (2, 2)), ("b", "F32", (1,))])
    for arguments, message in (
        (("c", bytes(4)), "no tensor c"),
        (("a", bytes(12)), "a takes 16 bytes, got 12"),
        (("a", bytes(24), 0, np.array([1, 3])), "keep must hold indices"),
        (("a", bytes(20), 0, np.array([0, 1])), "cannot be cut"),
        (("a", bytes(24), 1, np.array([0])), "no axis 1 of 1"),
        (("a", bytes(24), 2, np.array([0, 1])), "no axis 2"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(*arguments)
    writer.write("a", bytes(24), 0, np.array([0, 2]))
    with pytest.raises(ValueError, match="a was written already"):
        writer.write("a", bytes(16))
    with pytest.raises(ValueError, match="b was not written"):
        writer.close()
    with pytest.raises(FileExistsError):
        EXTENSION.Writer(tmp_path / "f", None, [])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        EXTENSION.Writer(tmp_path / "nowhere" / "f", None, [])
    for entries in ([("a", "Q7", (1,))], [("a", "F32", (2**62, 8))], [("a", "F32", ())] * 2):
        with pytest.raises(EXTENSION.MalformedError):
            EXTENSION.Writer(tmp_path / "g", None, entries)


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (struct.pack("<Q", 2**64 - 1), "a header of 18446744073709551615 bytes in a file of 8"),
        (struct.pack("<Q", 9) + b"{}", "a header of 9 bytes in a file of 10"),
        (raw_file(b""), "no '{' at byte 0"),
        (raw_file(b"{" * 100_000), "no '\"' at byte 1"),
        (raw_file(b'{"a":' * 100_000), "no '\"' at byte 6|unknown entry a|no '\"'|no '{'"),
        (raw_file(b"{} x"), "nothing more"),
        (raw_file(b'{"\xff":1}'), "no UTF-8 text at byte 2"),
        (raw_file(b'{"\\ud800":1}'), "pair of surrogates"),
        (raw_file({"a": 1}), "no '{' at byte"),
        (raw_file({"a": entry("F32", [1], 0, 4)}, b"123"), "tensor a at bytes 0..4 of 3 bytes"),
        (raw_file({"a": entry("F32", [1], 0, 4)}, b"12345"), "1 bytes behind the last tensor"),
        (raw_file({"a": entry("F32", [2], 0, 4)}, b"1234"), "tensor a .* call for 8 bytes"),
        (raw_file({"a": entry("F9", [1], 0, 4)}, b"1234"), "tensor a of the unknown dtype F9"),
        (raw_file({"a": entry("F4", [3], 0, 1)}, b"1"), "tensor a of a shape that ends within"),
        (raw_file({"a": entry("F32", [2**62, 4], 0, 4)}, b"1234"), "a of a shape that overflows"),
        (raw_file({"a": entry("F32", [-1], 0, 4)}, b"1234"), "integer that is not negative"),
        (raw_file({"a": entry("F32", [1.0], 0, 4)}, b"1234"), r"no ']' at byte"),
        (raw_file({"a": entry("F32", [2**63], 0, 4)}, b"1234"), "an integer below 2\\^63"),
        (raw_file({"a": entry("F32", [1], 4, 0)}, b"1234"), "tensor a .* ends before it begins"),
        (
            raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
            "tensor b at bytes 1..3, which overlaps",
        ),
        (
            raw_file({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"),
            "tensor b at bytes 2..3, with a hole",
        ),
        (raw_file(b'{"a":{},"a":{}}'), "tensor a without dtype, shape or data_offsets"),
        (
            raw_file(b'{"a":' + json.dumps(entry("U8", [0], 0, 0)).encode() + b',"a":'
                     + json.dumps(entry("U8", [0], 0, 0)).encode() + b"}"),
            "two entries for a",
        ),
        (raw_file({"a": {**entry("U8", [0], 0, 0), "x": 1}}), "unknown entry x"),
        (raw_file({"a": {**entry("U8", [0], 0, 0), "data_offsets": [0]}}), "1 data_offsets"),
        (raw_file(b'{"__metadata__":{"a":"b","a":"c"}}'), "two entries for a in its metadata"),
        (raw_file({"__metadata__": {"a": 1}}), "no '\"' at byte"),
    ],
)  # fmt: skip
def test_each_damage_has_its_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"/f is truncated or not .*: it has .*{message}"
    ) as e:
        native.SafetensorsFile(tmp_path / "f")
    assert "\n" not in str(e.value)


def test_what_is_no_file(path: str, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=str(place)):
            native.SafetensorsFile(place)


@pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")
def test_accepts_what_the_formats_library_accepts_and_no_more(tmp_path: Path) -> None:
    """Mutated files: the two readers, which share nothing, agree on what is a file."""
    save_file(some_tensors(), tmp_path / "valid", {"format": "pt"})
    valid = (tmp_path / "valid").read_bytes()
    end = 8 + int.from_bytes(valid[:8], "little")
    generator, accepted, rejected = random.Random(0), 0, 0
    file = tmp_path / "mutant"
    for _ in range(3000):
        content = bytearray(valid)
        for _ in range(generator.choice((1, 1, 2, 5))):
            at = generator.randrange(end if generator.random() < 0.9 else len(content))
            kind = generator.randrange(4)
            if kind == 0:
                content[at] ^= 1 << generator.randrange(8)
            elif kind == 1:
                content[at] = generator.choice(b'{}[]",:0123456789 \\ u')
            elif kind == 2:
                del content[generator.randrange(len(content)) :]
            else:
                other = generator.randrange(8, end)
                content[at], content[other] = content[other], content[at]
            if len(content) < end:
                break
        file.write_bytes(content)
        try:
            with safe_open(file, framework="pt") as opened:
                theirs = {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            theirs = None
        try:
            ours = {k: v[1] for k, v in native.SafetensorsFile(file).tensors.items()}
        except CheckpointError:
            ours = None
        if ours is not None:
            assert ours == theirs, bytes(content[:end])
            accepted += 1
        else:
            rejected += 1
            # What we alone refuse: entries given twice, and entries that we do not know.
            if theirs is not None:
                with pytest.raises(CheckpointError, match=r"two entries|unknown entry"):
                    native.SafetensorsFile(file)
    assert min(accepted, rejected) > 100
