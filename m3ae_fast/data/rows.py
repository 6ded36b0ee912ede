"""JSONLinesDataset: a row an example, images beside the file."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.images import open_image
from m3ae_fast.data.limits import MAX_TEXT, check_size, open_file
from m3ae_fast.data.sample import EncodedDataset, Sample, check_classes, clean_captions


class JSONLinesDataset(EncodedDataset):
    """Rows {"image": "a.jpg", "caption": "..."}, or {"text": "..."} of texts alone, one a line, UTF-8.

    `image` is a path relative to the file's folder, or an absolute one: the file can make the loader read any image
    that you can read. `caption` is a string or a list of several, and may be left out; so may `label`, a class's number
    or name, and `labels`, a list of those; null is as if left out. Only the offsets of the lines are kept in memory. A
    row is read when it is used; one that is damaged, or longer than 16 MiB, is then a BadSample, not an error of the
    whole file.

    Args:
        path: the file. channels: of the images, 1 to 16.
    Attributes:
        classes: the names of the labels, sorted; of numbers, "0" to the largest.
    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it has no row, labels are partly numbers and partly names, or there are more than 100,000 classes.
    """

    def __init__(self, path: str | os.PathLike, *, channels: int = 3):
        self.path, self.channels = Path(path), channels
        offsets, labels, position, begins = array("q"), set(), 0, True
        with open_file(self.path) as file:
            while line := file.readline(MAX_TEXT):
                if begins and (line.strip() or len(line) == MAX_TEXT):
                    offsets.append(position)
                    if b'"label' in line:  # the others need not be parsed to know the classes
                        labels |= _labels_met(line)
                begins = line.endswith(b"\n")  # or it goes on, and is too long
                position += len(line)
        if not offsets:
            raise ValueError(f"path must hold a JSON object a line, got none in {path}")
        self._offsets = np.frombuffer(offsets, np.int64)
        names = {label for label in labels if isinstance(label, str)}
        largest = max(labels - names, default=-1)
        if names and largest >= 0:
            raise ValueError(f"{path}: labels must all be names or all be numbers, got {max(names)!r} and {largest}")
        check_classes(path, len(names) or largest + 1)
        classes = sorted(names) or range(largest + 1)
        self.classes = tuple(map(str, classes))
        self._numbers = {label: number for number, label in enumerate(classes)}

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> Sample:
        """The sample, its image still encoded. BadSample: the row or its image cannot be read, or holds nothing."""
        name, row = self._row(index)
        if ("image" in row) == ("text" in row):
            raise BadSample(name, f"it must have either image or text, got {', '.join(row) or 'no field'}", "row")
        captions = _captions(name, row)
        labels = self._labels(name, row)
        if "text" in row:
            if not captions:
                raise BadSample(name, "there is no word in its text", "caption")
            return Sample(None, captions, name, labels)
        if not isinstance(row["image"], str):
            raise BadSample(name, f"image must be the path of an image file, got {json.dumps(row['image'])}", "row")
        image = open_image(self.path.parent / row["image"], f"{name}: {row['image']}", self.channels)
        return Sample(image, captions, name, labels)

    def captions(self) -> Iterator[str]:
        """All captions, no image read; rows that cannot be read are left out here, and named where they are used."""
        for index in range(len(self)):
            try:
                name, row = self._row(index)
                yield from _captions(name, row)
            except BadSample:
                continue

    def _row(self, index: int) -> tuple[str, dict]:
        """Its name, and its fields. A file is opened anew each time: no handle to share between processes."""
        begin = int(self._offsets[index])
        name = f"{self.path.name}, row {index + 1}"
        try:
            with open_file(self.path) as file:
                file.seek(begin)
                line = file.readline(MAX_TEXT + 1)
            check_size(len(line), MAX_TEXT)
            return name, _fields(name, line)
        except OSError as error:
            raise BadSample(name, str(error), "shard") from error
        except ValueError as error:  # of UTF-8, too
            raise BadSample(name, str(error).removeprefix(f"{name} "), "row") from None

    def _labels(self, name: str, row: dict) -> tuple[int, ...]:
        try:
            return tuple(self._numbers[label] for label in _labels(row))
        except (KeyError, TypeError):
            raise BadSample(name, "label must be a class's number or name, or labels a list of those", "row") from None


def _fields(name: str, line: bytes) -> dict:
    """Those of a row; null stands for one that is missing."""
    return {field: value for field, value in parse_object(name, line).items() if value is not None}


def _captions(name: str, row: dict) -> tuple[str, ...]:
    return clean_captions(name, row.get("caption", row.get("text")))


def _labels(row: dict) -> list:
    labels = row.get("labels", [])
    if not isinstance(labels, list):  # a word is no list of letters
        raise TypeError
    return [*labels, *([row["label"]] if "label" in row else [])]


def _labels_met(line: bytes) -> set[int | str]:
    """Those of a line that may be anything: what is wrong with it is said where it is used."""
    try:
        return {label for label in _labels(_fields("", line)) if isinstance(label, str) or _is_number(label)}
    except (ValueError, TypeError):
        return set()


def _is_number(label: object) -> bool:
    return type(label) is int and label >= 0


def parse_object(name: str, line: str | bytes) -> dict:
    """A line of a JSON-lines file, UTF-8. ValueError: it is no JSON object; `name` is what the message calls it."""
    try:
        line = line.decode("utf-8-sig") if isinstance(line, bytes) else line
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter: lists in lists in lists
        raise ValueError(f"{name} must be a JSON object, got {line.strip()[:60]!r}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value
