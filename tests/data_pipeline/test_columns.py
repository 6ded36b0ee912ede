"""Columns of HDF5 read from where they lie: what h5py reads, and no more than is there."""

import struct
import zlib

import h5py
import numpy as np
import pytest

from m3ae_fast.data import HDF5Dataset
from m3ae_fast.data.columns import HEAP, Column
from tests.data_pipeline.test_limits import no_waiting  # noqa: F401  a fixture
from tests.data_pipeline.test_readers import all_bad, pairs_file

WORDS = [b"one", b"", "zwei Füße".encode(), b"x" * 5000, *(b"%d" % i for i in range(96))]
NUMBERS = np.random.default_rng(0).integers(0, 256, (100, 7), np.uint8)
VALUES = {
    "strings": (WORDS, h5py.string_dtype()),
    "ascii": ([w if w.isascii() else b"-" for w in WORDS], h5py.string_dtype("ascii")),
    "bytes": ([np.frombuffer(w, np.uint8) for w in WORDS], h5py.vlen_dtype(np.uint8)),
    "fixed": ([w[:9] for w in WORDS], "S9"),
    "several": (np.array(WORDS, object).reshape(25, 4), h5py.string_dtype()),
    "several fixed": (np.array([w[:9] for w in WORDS]).reshape(25, 4), "S9"),
    "rows": (NUMBERS, "u1"),
    "numbers": (NUMBERS[:, 0].astype(">i8"), ">i8"),
    "booleans": (NUMBERS[:, 0] > 99, "?"),
}
LAYOUTS = {
    "one piece": {},
    "chunks": {"chunks": True},
    "gzip": {"compression": "gzip"},
    "shuffle": {"compression": "gzip", "shuffle": True},
    "checksum": {"fletcher32": True},
    "all": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "growing": {"maxshape": True},
}


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("kind", VALUES)
def test_rows_are_those_that_h5py_reads(tmp_path, kind, userblock, libver):
    values, dtype = VALUES[kind]
    shape = np.shape(values) if isinstance(values, np.ndarray) else (len(values),)
    with h5py.File(tmp_path / "a.h5", "w", libver=libver, userblock_size=userblock) as file:
        for layout, options in LAYOUTS.items():
            if "fletcher32" in options and h5py.check_dtype(vlen=np.dtype(dtype)) is not None:
                continue  # which HDF5 does not store
            options = {**options, "maxshape": (None, *shape[1:])} if "maxshape" in options else options
            column = file.create_dataset(layout, shape, dtype, **options)
            for i, value in enumerate(values):
                column[i] = value
            if options:
                options = {**options, "chunks": (3,) * len(shape)}
                file.create_dataset(f"{layout}, 3", shape, dtype, **options)[:] = column[:]
    with h5py.File(tmp_path / "a.h5") as file, open(tmp_path / "a.h5", "rb") as raw:
        for name, dataset in file.items():
            column = Column(dataset, raw.fileno())
            assert len(column) == len(dataset)
            for row in [*range(len(dataset)), 1, 50 % len(dataset)]:
                want, got = dataset[row], column[row]
                if kind.startswith("several"):
                    assert got == list(want), (name, row)
                else:
                    flat = np.uint8 if kind == "bytes" else dataset.dtype
                    want = want if isinstance(want, bytes) else np.asarray(want, flat).tobytes()
                    assert (got if isinstance(got, bytes) else got.tobytes()) == want, (name, row)
            if kind in ("rows", "numbers"):
                got = column.rows(3, 90).view(dataset.dtype).reshape(87, *shape[1:])
                assert np.array_equal(got, dataset[3:90]), name


def test_rows_that_were_never_written(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, options in (("one piece", {}), ("chunks", {"chunks": (2,)})):
            file.create_dataset(name, (5,), h5py.string_dtype(), **options)
    with h5py.File(tmp_path / "a.h5") as file, open(tmp_path / "a.h5", "rb") as raw:
        assert all(Column(dataset, raw.fileno())[row] == b"" for dataset in file.values() for row in range(5))


@pytest.mark.parametrize(
    "dtype, options, message",
    [
        (h5py.vlen_dtype(np.float64), {}, "its rows must be strings, bytes or numbers, got object"),
        (h5py.ref_dtype, {}, "its rows must be strings, bytes or numbers, got object"),
        (np.dtype([("a", h5py.string_dtype()), ("b", "i4")]), {}, "its rows must be strings, bytes or numbers"),
        ("S5", {"compression": "lzf"}, r"its filters must be of gzip, shuffle and fletcher32, got numbers \[32000\]"),
        ("i4", {"scaleoffset": 0, "chunks": True}, "its filters must be of gzip, shuffle and fletcher32"),
    ],
)
def test_what_is_not_read(tmp_path, dtype, options, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("text", (4,), dtype, **options)
    with pytest.raises(ValueError, match=r"a\.h5: text cannot be read: " + message):
        HDF5Dataset(tmp_path / "a.h5")


def test_a_heap_whose_objects_take_no_space(tmp_path):
    """libhdf5 goes round and round in it; or out of it, where their sizes overflow."""
    path = pairs_file(tmp_path / "a.h5", text=["one", "two", "six"])
    whole = path.read_bytes()
    heap = whole.index(b"GCOL")
    assert HEAP.unpack_from(whole, heap)[2] == 4096
    for number, (at, size) in enumerate([(0, 0), (0, 2**64 - 1), (0, 2**64 - 16), (0, 5000), (24, 0), (24, 2**63)]):
        data = bytearray(whole)
        struct.pack_into("<Q", data, heap + 16 + at + 8, size)
        (tmp_path / f"{number}.h5").write_bytes(data)
        dataset = HDF5Dataset(tmp_path / f"{number}.h5")
        bad = all_bad(dataset)
        assert bad and all("the heap that it lies in is damaged" in str(b) and b.kind == "shard" for b in bad.values())
    data = bytearray(whole)
    struct.pack_into("<Q", data, heap + 8, 1 << 60)  # of the heap: what lies in it is still there
    (tmp_path / "b.h5").write_bytes(data)
    assert not all_bad(HDF5Dataset(tmp_path / "b.h5"))


@pytest.mark.parametrize("stored", [b"a", b"ab", b"abcd", zlib.compress(bytes(10**6)), zlib.compress(b"a" * 16)])
def test_chunks_of_another_size(tmp_path, stored):
    """With a checksum of less than its four bytes, libhdf5 reads outside of its memory; or they unpack to a million."""
    for name, options in (
        ("a", {"fletcher32": True}),
        ("b", {"compression": "gzip"}),
        ("c", {"compression": "gzip", "fletcher32": True}),
    ):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            column = file.create_dataset("text", (2,), "S8", chunks=(2,), **options)
            column.id.write_direct_chunk((0,), stored)
        texts = HDF5Dataset(tmp_path / f"{name}.h5")
        if name == "b" and len(stored) and zlib_size(stored) == 16:
            assert texts[1].captions == ("aaaaaaaa",)
        else:
            assert [bad.kind for bad in all_bad(texts).values()] == ["shard", "shard"]


def zlib_size(data: bytes) -> int:
    try:
        return len(zlib.decompress(data))
    except zlib.error:
        return 0


def test_a_checksum_that_does_not_agree(tmp_path):
    for size in (1, 2, 3, 1000):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("text", data=np.array([b"a" * size]), chunks=(1,), fletcher32=True)
        data = bytearray((tmp_path / "a.h5").read_bytes())
        assert HDF5Dataset(tmp_path / "a.h5")[0].captions == ("a" * size,)
        data[data.rindex(b"a" * size)] ^= 1
        (tmp_path / "b.h5").write_bytes(data)
        (bad,) = all_bad(HDF5Dataset(tmp_path / "b.h5")).values()
        assert "the checksum of a chunk does not agree with it" in str(bad)
