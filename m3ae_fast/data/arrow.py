"""Rows of Arrow files, as Hugging Face datasets writes them (the streaming format), read from where they lie.

Here every place and size that comes from a file is checked. pyarrow, the library for it, ends the process where a
schema is forged, and takes offsets within a column as they come.

Source: Arrow columnar format 1.5, section "Serialization and interprocess communication (IPC)", with Message.fbs and
Schema.fbs; flatbuffers' "internals".
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3ae_fast.data.limits import MAX_TEXT, check_size, open_file

MAX_ROWS = 2**31 - 1
MAX_COLUMNS, MAX_DEPTH = 10_000, 8  # with the columns in columns
SCHEMA, BATCH = 1, 3  # kinds of messages
INTEGER, BINARY, TEXT, LIST, STRUCT, FIXED_LIST, MAP = 2, 4, 5, 12, 13, 16, 17  # types, by their numbers in a file
LARGE = {19: BINARY, 20: TEXT, 21: LIST}  # the same with offsets of 64 bits
BUFFERS = dict.fromkeys((INTEGER, 3, 6, 7, 8, 9, 10, 11, LIST, 15, MAP, 18), 2)  # of a type; of nested ones their own
BUFFERS |= {1: 0, BINARY: 3, TEXT: 3, STRUCT: 1, FIXED_LIST: 1}
NAMES = {INTEGER: "int64", BINARY: "bytes", TEXT: "text", LIST: "list", STRUCT: "struct"}


class Column(NamedTuple):
    """kind: one of NAMES, or of a type that is not read, "other". node, buffer: the numbers of its first ones in a
    record batch. offset: bytes of an offset into its data or child."""

    name: str
    kind: str
    node: int
    buffer: int
    offset: int
    children: tuple[Column, ...]

    def __str__(self) -> str:
        inner = ", ".join(f"{each.name}: {each}" if self.kind == "struct" else str(each) for each in self.children)
        return f"{self.kind} of {inner}" if inner else self.kind


class ArrowRows:
    """The rows of Arrow files with the same columns, one file behind the other. They are mapped, and in memory is kept
    where their record batches begin.

    Args:
        paths: the files, at least one.
    Attributes:
        columns: by name.
    Raises:
        OSError: there is no such file.
        ValueError: a file breaks off, holds other columns than the first, dictionaries or compressed columns, or is no
            Arrow stream at all.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths, self._maps = [Path(path) for path in paths], {}
        files, places, rows = array("l"), array("q"), array("q", [0])
        for number, path in enumerate(self.paths):
            try:
                messages = _messages(self._map(number))
                columns = _columns(next(messages, None))
                if number == 0:
                    self.columns = columns
                elif columns != self.columns:
                    raise ValueError("its columns are not those of the first file")
                for message in messages:
                    count = _Batch(message).length
                    files.append(number)
                    places.append(message.place)
                    rows.append(rows[-1] + count)
                    if rows[-1] > MAX_ROWS:
                        raise ValueError(f"it has more than {MAX_ROWS:,} rows")
            except (ValueError, struct.error) as error:
                raise ValueError(f"{path} cannot be read as an Arrow stream: {error}") from None
        self._files, self._places, self._rows = np.array(files), np.array(places), np.array(rows)

    def __len__(self) -> int:
        return int(self._rows[-1])

    def cell(self, name: str, row: int, most: int):
        """A column's value in a row, as Python has it. ValueError: it is damaged, or of more than `most` bytes."""
        batch = int(np.searchsorted(self._rows, row, "right")) - 1
        message = _message(self._map(int(self._files[batch])), int(self._places[batch]))
        try:
            return _Batch(message).value(self.columns[name], row - int(self._rows[batch]), most)
        except struct.error as error:
            raise ValueError(f"the record batch ends before it: {error}") from None

    def _map(self, number: int) -> memoryview:
        if number not in self._maps:
            with open_file(self.paths[number]) as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise ValueError("it is empty")
                self._maps[number] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}


class _Message(NamedTuple):
    """place: where it begins in its file. kind: of message. table: where in `text`, a flatbuffer, what it says is."""

    place: int
    kind: int
    table: int
    text: memoryview
    body: memoryview


def _message(data: memoryview, place: int) -> _Message | None:
    """The message at a place of a file; None: it ends there."""
    if len(data) - place < 8:
        raise ValueError("it breaks off")
    marker, size = struct.unpack_from("<Ii", data, place)
    if marker != 0xFFFFFFFF:
        raise ValueError("a message does not begin where it should")
    if size == 0:
        return None
    begin = place + 8
    text = data[begin : begin + max(size, 0)]
    check_size(size, MAX_TEXT)
    if len(text) < size or size < 8:
        raise ValueError("it breaks off")
    root = _table(text, 0)
    kind, table, length = _number(text, root, 1, "<B"), _field(text, root, 2), _number(text, root, 3, "<q")
    body = data[begin + size : begin + size + max(length, 0)]
    if not table or length != len(body):
        raise ValueError("it breaks off")
    return _Message(place, kind, _table(text, table), text, body)


def _messages(data: memoryview) -> Iterator[_Message]:
    place = 0
    while (message := _message(data, place)) is not None:
        yield message
        place += 8 + len(message.text) + len(message.body)


def _columns(message: _Message | None) -> dict[str, Column]:
    """What a schema names."""
    if message is None or message.kind != SCHEMA:
        raise ValueError("it must begin with a schema")
    text, taken = message.text, [0, 0]  # nodes and buffers so far

    def column(field: int, depth: int) -> Column:
        node, buffer = taken
        kind, type_table = _number(text, field, 2, "<B"), _field(text, field, 3)
        if _field(text, field, 4):
            raise ValueError("it must not have columns of dictionaries")
        wide, kind = kind in LARGE, LARGE.get(kind, kind)
        if kind not in BUFFERS or node >= MAX_COLUMNS or depth > MAX_DEPTH:
            raise ValueError(f"it has a column of a type that is not known, or too many: type {kind}, column {node}")
        taken[:] = node + 1, buffer + BUFFERS[kind]
        name = _field(text, field, 0)
        children = tuple(column(child, depth + 1) for child in _tables(text, _field(text, field, 5)))
        known = kind in NAMES and (kind != LIST or len(children) == 1)
        if kind == INTEGER:
            known = type_table and _number(text, _table(text, type_table), 0, "<i") == 64
        kind = NAMES[kind] if known else "other"
        return Column(_text(text, name), kind, node, buffer, 8 if wide else 4, children)

    fields = [column(field, 1) for field in _tables(text, _field(text, message.table, 1))]
    columns = {each.name: each for each in fields}
    if len(columns) != len(fields):
        raise ValueError("its columns must have different names")
    return columns


class _Batch:
    """A record batch. length: its rows."""

    def __init__(self, message: _Message):
        if message.kind != BATCH:
            raise ValueError(f"it must hold record batches alone, got a message of kind {message.kind}")
        text, table = message.text, message.table
        if _field(text, table, 3):
            raise ValueError("it must not be compressed")
        self.length, self._body = _number(text, table, 0, "<q"), message.body
        self._nodes, self._buffers = (_vector(text, _field(text, table, number), 16) for number in (1, 2))
        rows, _ = struct.unpack_from("<qq", self._nodes) if len(self._nodes) else (0, 0)
        if self.length != rows or not 0 <= rows <= 8 * len(message.body):
            raise ValueError(f"a record batch of {len(message.body):,} bytes cannot have {self.length:,} rows")

    def value(self, column: Column, row: int, most: int):
        """Of a column in a row. ValueError, struct.error: it is damaged, or of more than `most` bytes."""
        length, nulls = struct.unpack_from("<qq", self._nodes, 16 * column.node)
        if not 0 <= row < length:
            raise ValueError("the record batch ends before it")
        if nulls and len(valid := self._buffer(column.buffer)) and not self._at(valid, "B", row // 8)[0] >> row % 8 & 1:
            return None
        if column.kind == "struct":
            return {child.name: self.value(child, row, most) for child in column.children}
        data = self._buffer(column.buffer + 1)
        if column.kind == "int64":
            return self._at(data, "q", row)[0]
        size = "i" if column.offset == 4 else "q"
        (begin,), (end,) = self._at(data, size, row), self._at(data, size, row + 1)
        if not 0 <= begin <= end:
            raise ValueError("its offsets do not ascend")
        if column.kind == "list":
            values, size = [], 0
            for i in range(begin, end):
                values.append(self.value(column.children[0], i, most))
                size += len(values[-1]) if isinstance(values[-1], str | bytes) else 8
                check_size(size, most)
            return values
        check_size(end - begin, most)
        found = bytes(self._buffer(column.buffer + 2)[begin:end])
        if len(found) != end - begin:
            raise ValueError("its offsets lead out of the column")
        return found.decode("utf-8") if column.kind == "text" else found

    def _buffer(self, number: int) -> memoryview:
        offset, size = struct.unpack_from("<qq", self._buffers, 16 * number)
        if offset < 0 or size < 0 or offset + size > len(self._body):
            raise ValueError("a column lies outside of its record batch")
        return self._body[offset : offset + size]

    def _at(self, data: memoryview, kind: str, number: int) -> tuple:
        return struct.unpack_from(f"<{kind}", data, number * struct.calcsize(f"<{kind}"))


# Flatbuffers: a table's fields have numbers, and are looked up in the table of offsets that it names.


def _read(text: memoryview, kind: str, at: int) -> int:
    if at < 0:  # struct would count from the end
        raise ValueError("a message is damaged")
    return struct.unpack_from(kind, text, at)[0]


def _field(text: memoryview, table: int, number: int) -> int:
    """Where a field is; 0: the table has none."""
    offsets = table - _read(text, "<i", table)
    at = 4 + 2 * number
    offset = _read(text, "<H", offsets + at) if at < _read(text, "<H", offsets) else 0
    return table + offset if offset else 0


def _number(text: memoryview, table: int, number: int, kind: str) -> int:
    at = _field(text, table, number)
    return _read(text, kind, at) if at else 0


def _table(text: memoryview, at: int) -> int:
    return at + _read(text, "<I", at)


def _vector(text: memoryview, at: int, size: int) -> memoryview:
    """The bytes of a vector of things of one size; none where there is no such field."""
    if not at:
        return text[:0]
    begin = _table(text, at)
    found = text[begin + 4 : begin + 4 + _read(text, "<I", begin) * size]
    if len(found) != _read(text, "<I", begin) * size:
        raise ValueError("a message is damaged")
    return found


def _tables(text: memoryview, at: int) -> list[int]:
    """Where the tables of a vector of tables are."""
    count = len(_vector(text, at, 4)) // 4
    begin = _table(text, at) + 4 if at else 0
    return [_table(text, begin + 4 * i) for i in range(count)]


def _text(text: memoryview, at: int) -> str:
    return bytes(_vector(text, at, 1)).decode("utf-8")
