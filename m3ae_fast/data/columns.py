"""Columns of an HDF5 file, read from where they lie.

libhdf5 says where. Its own reading of rows (2.0) loops without end, or leaves its memory, where the heap of strings or
a chunk with a checksum is forged: here every place and size that comes from the file is checked.

Source: HDF5 File Format Specification 3.0, sections III.E (global heap) and IV.A.2.l (filters).
"""

from __future__ import annotations

import itertools
import math
import os
import struct
import zlib

import numpy as np

from m3ae_fast.data.limits import MAX_BYTES, check_size

GZIP, SHUFFLE, CHECKSUM = 1, 2, 3  # filters, by their numbers in a file
REFERENCE = struct.Struct("<IQI")  # what stands for a value of any length: how long it is, its heap, its number there
HEAP = struct.Struct("<4sBxxxQ")  # GCOL, version, bytes with this header
OBJECT = struct.Struct("<HHxxxxQ")  # number, users, bytes
BLOCK = 1 << 16  # bytes of a heap that are read at once
MAX_OFFSET = 1 << 62
MAX_OBJECTS = 1 << 16  # of a heap
MAX_CHUNKS = 10_000  # that a row lies in


class Column:
    """A data set with rows of strings, bytes or numbers, of which `column[row]` is one.

    Args:
        dataset: an h5py.Dataset, stored in its file itself.
        descriptor: of that file, open for reading.
    Raises:
        ValueError: it has another type, layout or filter, or rows or chunks of more than MAX_BYTES.
    """

    def __init__(self, dataset, descriptor: int):
        import h5py

        self.dtype, self.shape, self._dataset, self._descriptor = dataset.dtype, dataset.shape, dataset, descriptor
        base, string = h5py.check_vlen_dtype(self.dtype), h5py.check_string_dtype(self.dtype)
        self._any_length = string.length is None if string else base is not None and np.dtype(base).itemsize == 1
        self._item = REFERENCE.size if self._any_length else self.dtype.itemsize
        if not self._any_length and (self.dtype.hasobject or dataset.id.get_type().get_size() != self._item):
            raise ValueError(f"its rows must be strings, bytes or numbers, got {self.dtype}")
        file, stored = dataset.file.id.get_create_plist(), dataset.id.get_create_plist()
        self._base, self._chunks = file.get_userblock(), dataset.chunks
        if file.get_sizes() != (8, 8) or stored.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
            raise ValueError("it must lie in one piece or in chunks, in a file with addresses of 8 bytes")
        self._filters = [stored.get_filter(i)[0] for i in range(stored.get_nfilters())]
        if not {GZIP, SHUFFLE, CHECKSUM}.issuperset(self._filters):
            raise ValueError(f"its filters must be of gzip, shuffle and fletcher32, got numbers {self._filters}")
        self._row, self._chunk = self._item * math.prod(self.shape[1:]), self._item * math.prod(self._chunks or ())
        for what, size in (("rows", self._row), ("chunks", self._chunk if self._chunks else 0)):
            if size > MAX_BYTES:
                raise ValueError(f"its {what} must have at most {MAX_BYTES:,} bytes, got {size:,}")
        if self._chunks and math.prod(map(math.ceil, np.divide(self.shape[1:], self._chunks[1:]))) > MAX_CHUNKS:
            raise ValueError(f"its rows must lie in at most {MAX_CHUNKS:,} chunks, got {self._chunks} of {self.shape}")
        self._last: tuple | None = None  # corner and contents of the chunk that was read last
        self._heap: _Heap | None = None  # that was read last

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> bytes | list[bytes] | np.ndarray:
        """A string or a row of bytes, a list of several, or an array of numbers. ValueError: it is damaged."""
        raw = self.rows(row, row + 1)[0]
        if self._any_length:
            values = [self._value(*reference) for reference in REFERENCE.iter_unpack(raw.tobytes())]
        else:
            values = raw.view(self.dtype)
            if self.dtype.kind != "S":
                return values
            values = values.tolist()
        return values[0] if len(self.shape) == 1 else values

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Some rows as they are stored, [end - begin, bytes] uint8, 0 where nothing was written.

        Raises:
            ValueError: they are damaged.
        """
        rows = np.zeros((end - begin, *self.shape[1:], self._item), np.uint8)
        if self._chunks is None:
            offset = self._dataset.id.get_offset()
            if offset is not None:
                rows.ravel()[:] = np.frombuffer(read(self._descriptor, offset + begin * self._row, rows.size), np.uint8)
            return rows.reshape(len(rows), -1)
        starts = [range(0, n, chunk) for n, chunk in zip(self.shape, self._chunks, strict=True)]
        starts[0] = range(begin - begin % self._chunks[0], end, self._chunks[0])
        for corner in itertools.product(*starts):
            chunk = self._contents(corner)[tuple(slice(n - c) for n, c in zip(self.shape, corner, strict=True))]
            low, high = max(corner[0], begin), min(corner[0] + len(chunk), end)
            inside = (slice(c, c + n) for c, n in zip(corner[1:], chunk.shape[1:-1], strict=True))
            rows[(slice(low - begin, high - begin), *inside)] = chunk[low - corner[0] : high - corner[0]]
        return rows.reshape(len(rows), -1)

    def _contents(self, corner: tuple[int, ...]) -> np.ndarray:
        """[*chunks, bytes of an item] uint8."""
        if self._last is None or self._last[0] != corner:
            info = self._dataset.id.get_chunk_info_by_coord(corner)
            data = bytes(self._chunk)
            if info.byte_offset is not None:
                data = self._unfiltered(read(self._descriptor, info.byte_offset, info.size), info.filter_mask)
            self._last = corner, np.frombuffer(data, np.uint8).reshape(*self._chunks, self._item)
        return self._last[1]

    def _unfiltered(self, data: bytes, mask: int) -> bytes:
        """A chunk as it was before its filters, but for those that the mask says were left out."""
        for number, kind in reversed(list(enumerate(self._filters))):
            if mask >> number & 1:
                continue
            if kind == CHECKSUM:
                data, checksum = data[:-4], data[-4:]
                if not _agrees(data, checksum):
                    raise ValueError("the checksum of a chunk does not agree with it")
            elif kind == GZIP:
                data = zlib.decompressobj().decompress(data, self._chunk + 4)
            else:
                whole = len(data) // self._item * self._item
                data = np.frombuffer(data[:whole], np.uint8).reshape(self._item, -1).T.tobytes() + data[whole:]
        if len(data) != self._chunk:
            raise ValueError(f"a chunk has {len(data):,} bytes, it should have {self._chunk:,}")
        return data

    def _value(self, length: int, address: int, number: int) -> bytes:
        """What a reference stands for."""
        if length == 0:
            return b""
        if self._heap is None or self._heap.address != self._base + address:
            self._heap = _Heap(self._descriptor, self._base + address)
        return self._heap.value(number, length)


class _Heap:
    """A collection of objects in the file; how far it was read is kept, since rows often follow one another."""

    def __init__(self, descriptor: int, address: int):
        self.address, self._descriptor, self._at, self._places, self._seen = address, descriptor, HEAP.size, {}, 0
        self._begin = os.pread(descriptor, BLOCK, address) if address < MAX_OFFSET else b""
        head = HEAP.unpack_from(self._begin.ljust(HEAP.size, b"\0"))
        self._size = head[2] if head[:2] == (b"GCOL", 1) else 0

    def value(self, number: int, length: int) -> bytes:
        """The first bytes of an object. ValueError: there are not as many."""
        while number not in self._places:
            if self._at + OBJECT.size > self._size or self._seen == MAX_OBJECTS:
                raise ValueError("the heap that it lies in is damaged")
            self._seen += 1
            found, _, there = OBJECT.unpack(self._read(self._at, OBJECT.size))
            at = self._at + OBJECT.size
            self._at = at + -(-there // 8) * 8 if found else self._size  # 0: what follows is free
            self._places[found] = at, min(there, self._size - at)
        at, there = self._places[number]
        if number == 0 or length > there:
            raise ValueError("the heap that it lies in is damaged")
        return self._read(at, length)

    def _read(self, at: int, size: int) -> bytes:
        if at + size <= len(self._begin):
            return self._begin[at : at + size]
        return read(self._descriptor, self.address + at, size)


def read(descriptor: int, offset: int, size: int) -> bytes:
    """Bytes of a file. ValueError: it ends before them, or they are more than MAX_BYTES."""
    check_size(size, MAX_BYTES)
    data = os.pread(descriptor, size, offset) if offset < MAX_OFFSET else b""
    if len(data) < size:
        raise ValueError("the file ends before it")
    return data


def _agrees(data: bytes, checksum: bytes) -> bool:
    """Whether it is Fletcher's of 16-bit words, high byte first, modulo 65535."""
    words = np.frombuffer(data + bytes(len(data) % 2), ">u2").astype(np.uint64)
    places = np.arange(len(words), 0, -1, dtype=np.uint64) % 65535
    sums = (int((words * places).sum()) % 65535, int(words.sum()) % 65535)
    return len(checksum) == 4 and sums == tuple(n % 65535 for n in struct.unpack("<HH", checksum)[::-1])
