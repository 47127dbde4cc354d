"""Compaction and writing, with the C++ extension and without: every byte, and every refusal."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_fast.checkpoint import native

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
    assert native.UNUSED_REASON is None
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
        ({"rows": 5}, "expected a source of 20 bytes, got 16"),
        ({"axis": 2}, "axis must be 0 or 1, got 2"),
        ({"columns": 2**62, "item_bytes": 8}, "larger than memory"),
        ({"rows": 2**40, "columns": 2**40}, "larger than memory"),
        ({"keep": np.arange(3, dtype="i4")}, "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            EXTENSION.compact(source, source.copy(), **{"keep": keep, **sizes, **changes})
    with pytest.raises(ValueError, match="room for 8 bytes, got 7"):
        EXTENSION.compact(source, np.zeros(7, "u1"), keep=keep, **sizes)
    memory = np.zeros(20, "u1")
    with pytest.raises(ValueError, match="not overlap"):
        EXTENSION.compact(memory[:16], memory[4:], keep=keep, **sizes)
    with pytest.raises(BufferError):
        EXTENSION.compact(source, bytes(16), keep=keep, **sizes)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    file = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    yield file
    os.close(file)


@pytest.mark.parametrize("kind", ["u2", "u4", "u8"])
def test_writes_what_numpy_takes(path: str, kind: str, opened: int) -> None:
    if path == "portable":
        pytest.skip("a matter of compaction")
    for shape in ((3, 7), (200, 333), (1, 140_001), (5001, 3), (300_001,), (2, 3, 4), ()):
        whole = np.random.default_rng(4).integers(0, 100, shape).astype(kind)
        cuts = [(0, None)]
        if len(shape) in (1, 2):
            cuts += [(axis, keep) for axis in range(len(shape)) for keep in keeps(shape[axis])]
        for axis, keep in cuts:
            os.truncate(opened, 0)
            finite = native.write_tensor(opened, 5, whole, exponent=0x7000, axis=axis, keep=keep)
            expected = whole if keep is None else whole.take(keep, axis)
            assert finite
            assert os.pread(opened, expected.nbytes + 6, 5) == expected.tobytes()


def test_refused_writes(path: str, opened: int) -> None:
    bits = np.zeros((4, 4), "u2")
    for keep in ([4], [-5]):
        with pytest.raises((ValueError, IndexError)):
            native.write_tensor(opened, 0, bits, exponent=0x7F80, keep=np.array(keep))
    assert os.fstat(opened).st_size == 0
    reading = os.open(f"/proc/self/fd/{opened}", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.write_tensor(reading, 0, bits, exponent=0x7F80)
    os.close(reading)


@pytest.mark.skipif(EXTENSION is None, reason="the extension is not built")
def test_the_extension_checks_what_it_writes(opened: int) -> None:
    sizes: dict[str, Any] = {"rows": 4, "columns": 4, "item_bytes": 2, "exponent": 0x7F80}
    source, keep = np.zeros(16, "u2"), np.array([1, 3])
    for changes, message in (
        ({"rows": 5}, "expected a source of 40 bytes, got 32"),
        ({"axis": 2}, "axis must be 0 or 1"),
        ({"keep": np.array([3, 1])}, "keep must be sorted"),
        ({"keep": np.array([4])}, "keep must hold indices"),
        ({"columns": 2**62}, "larger than memory"),
        ({"item_bytes": 1, "columns": 8}, "cannot be checked"),
        ({"offset": 2**63 - 1}, "larger than a file can be"),
    ):
        arguments = {"offset": 0, "keep": keep, **sizes, **changes}
        with pytest.raises(ValueError, match=message):
            EXTENSION.write(opened, source=source, **arguments)
    assert os.fstat(opened).st_size == 0
