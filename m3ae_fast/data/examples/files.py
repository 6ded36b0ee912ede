"""The tasks on a user's data: JSON lines, one example each, beside the images they name; or a folder of pairs.

    pairs       {"image": "a.jpg", "caption": "a red circle"}        caption: one, or a list of several
    questions   {"image": "a.jpg", "question": "what is it?", "answer": "a circle", "kind": "shape"}
    statements  {"left": "a.jpg", "right": "b.jpg", "sentence": "both are red", "label": true, "kind": "color"}
    phrases     {"image": "a.jpg", "phrase": "a red circle", "box": [10, 20, 42, 52]}

`kind` and `box` may be left out. Paths are relative to the file's folder; boxes are (x0, y0, x1, y1) in pixels of the
upright image, x1 and y1 just outside. Rows are checked when a file is opened; an image is read with its example.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from m3ae_fast import _checks
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data.examples.shapes import ShapesPairs, ShapesPhrases, ShapesQuestions, ShapesStatements
from m3ae_fast.data.folder import FolderDataset, is_image
from m3ae_fast.data.images import open_image
from m3ae_fast.data.limits import open_file
from m3ae_fast.data.rows import parse_object
from m3ae_fast.data.shapes import check_drawn
from m3ae_fast.examples import Pair, Phrase, Question, Statement

COUNT = 1000  # of drawn examples, where none is given


def open_pairs(
    spec: str, *, image_size: int | tuple[int, int], channels: int = 3, seed: int = 0, count: int | None = None
) -> Sequence[Pair]:
    """Images and their captions.

    Args:
        spec: "shapes", synthetic scenes; else the path of a JSON-lines file, or of a folder of name.jpg + name.txt.
        image_size: pixels a side, or (height, width), that `shapes` draws; files keep their images' own sizes.
        channels: of the images, 1 to 16.
        seed: of the scenes.
        count: of examples; None: 1000 scenes, or all there are. Of a file the first ones are taken.
    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: naming file, line and field, and what is wrong with it.
        BadSample: an image cannot be read, when its example is asked for.
    """
    if spec != "shapes" and Path(spec).is_dir():
        return FolderPairs(spec, count, channels)
    return _open(spec, ShapesPairs, FilePairs, image_size, channels, seed, count)


def open_questions(
    spec: str, *, image_size: int | tuple[int, int], channels: int = 3, seed: int = 0, count: int | None = None
) -> ShapesQuestions | FileQuestions:
    """Questions about images, "shapes" or a JSON-lines file; `answers()` lists what they can be answered with.
    Arguments and errors as those of `open_pairs`."""
    return _open(spec, ShapesQuestions, FileQuestions, image_size, channels, seed, count)


def open_statements(
    spec: str, *, image_size: int | tuple[int, int], channels: int = 3, seed: int = 0, count: int | None = None
) -> Sequence[Statement]:
    """Sentences about two images, "shapes" or a JSON-lines file. Arguments and errors as those of `open_pairs`."""
    return _open(spec, ShapesStatements, FileStatements, image_size, channels, seed, count)


def open_phrases(
    spec: str, *, image_size: int | tuple[int, int], channels: int = 3, seed: int = 0, count: int | None = None
) -> Sequence[Phrase]:
    """Phrases to find in images, "shapes" or a JSON-lines file. Arguments and errors as those of `open_pairs`."""
    return _open(spec, ShapesPhrases, FilePhrases, image_size, channels, seed, count)


def read_answers(path: str | os.PathLike) -> list[str]:
    """A fixed list of answers, one a line, UTF-8, in the file's order; blank lines are left out.

    Raises:
        FileNotFoundError, IsADirectoryError.
        ValueError: naming the file, and the line of an answer that is there twice.
    """
    path, first = Path(path), {}
    for number, line in _lines(path):
        answer = line.strip()
        if answer in first:
            raise ValueError(
                f"{path}, line {number}: each answer must be there once, got {answer!r} as on line {first[answer]}"
            )
        first[answer] = number
    if not first:
        raise ValueError(f"{path} must hold an answer a line, got none")
    return list(first)


class FolderPairs(Sequence):
    """Of a FolderDataset, the images with captions; of the others a warning tells how many there are.

    Args:
        path: the folder.
        count: of pairs, at most; None: all.
        channels: of the images.
    Raises:
        ValueError: it holds no pair. FileNotFoundError, NotADirectoryError.
    """

    def __init__(self, path: str | os.PathLike, count: int | None = None, channels: int = 3):
        _check_count(count)
        self._files = FolderDataset(path, channels=channels)
        names = self._files.names
        pairs = [i for i, name in enumerate(names) if is_image(name) and self._files.captions_of(name)]
        if not pairs:
            raise ValueError(f"{path} must hold images with captions, got none among {len(names)} files")
        if len(pairs) < len(names):
            alone = names[min(set(range(len(names))).difference(pairs))]
            message = (
                f"{path}: {len(names) - len(pairs)} of {len(names)} are no pair of image and caption, left out: {alone}"
            )
            warnings.warn(message, M3AEFastWarning, stacklevel=3)
        self._pairs = pairs[:count]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        """Raises BadSample."""
        sample = self._files[self._pairs[index]]
        return Pair(sample.image, sample.captions, sample.name)


class _Row(NamedTuple):
    name: str  # file and line
    values: dict[str, Any]  # of each field, checked; of an image its path


class _File(Sequence):
    """The rows of a JSON-lines file; a subclass says what they hold and makes an example of one.

    Args:
        path: of the file.
        count: of rows, at most; None: all.
        channels: of the images.
    """

    fields: ClassVar[dict[str, Callable[[object, Path], Any]]]  # what checks a value, given the folder of the file
    optional: ClassVar[dict[str, Callable[[object, Path], Any]]] = {}

    def __init__(self, path: str | os.PathLike, count: int | None = None, channels: int = 3):
        _check_count(count)
        self.path, self.channels = Path(path), channels
        self.rows, unread = [], set()
        for number, line in _lines(self.path):
            if len(self.rows) == count:
                break
            name = f"{self.path}, line {number}"
            given = parse_object(name, line)
            self.rows.append(_Row(name, self._checked(name, given)))
            unread |= given.keys() - self.fields.keys() - self.optional.keys()
        if not self.rows:
            raise ValueError(f"{self.path} must hold a JSON object a line, got none")
        if unread:  # a misspelt "box" would be missed, and nobody told
            known = ", ".join([*self.fields, *self.optional])
            message = f"{self.path}: fields that are not read: {', '.join(sorted(unread))}; read are {known}"
            warnings.warn(message, M3AEFastWarning, stacklevel=4)

    def _checked(self, name: str, given: dict) -> dict:
        values = {}
        for field, check in (self.fields | self.optional).items():
            if field not in given:
                if field in self.fields:
                    raise ValueError(f"{name}: {field} must be given, got {', '.join(given) or 'no field'}")
                continue
            try:
                values[field] = check(given[field], self.path.parent)
            except ValueError as error:
                raise ValueError(
                    f"{name}: {field} must {error}, got {json.dumps(given[field], ensure_ascii=False)}"
                ) from None
        return values

    def __len__(self) -> int:
        return len(self.rows)

    def _image(self, row: _Row, field: str) -> np.ndarray:
        return open_image(row.values[field], f"{row.name}: {field} {row.values[field]}", self.channels).decoded()


# What checks a field's value: hands it back, or raises ValueError("be ...").


def _text(value: object, folder: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("be a string with a word in it")
    return value.strip()


def _captions(value: object, folder: Path) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError("be a string with a word in it, or a list of such")
    return tuple(map(str.strip, values))


def _path(value: object, folder: Path) -> Path:
    if not isinstance(value, str) or not (folder / value).is_file():
        raise ValueError("be the path of an image file")
    return folder / value


def _bool(value: object, folder: Path) -> bool:
    if not isinstance(value, bool):
        raise ValueError("be true or false")
    return value


def _box(value: object, folder: Path) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or [type(v) for v in value] != [int] * 4:
        raise ValueError("be [x0, y0, x1, y1] in whole pixels")
    x0, y0, x1, y1 = value
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError("be [x0, y0, x1, y1] with 0 <= x0 < x1 and 0 <= y0 < y1")
    return x0, y0, x1, y1


class FilePairs(_File):
    """Rows {"image", "caption"}."""

    fields: ClassVar = {"image": _path, "caption": _captions}

    def __getitem__(self, index: int) -> Pair:
        """Raises BadSample: the image cannot be read."""
        row = self.rows[index]
        return Pair(self._image(row, "image"), row.values["caption"], row.name)


class FileQuestions(_File):
    """Rows {"image", "question", "answer", "kind"?}."""

    fields: ClassVar = {"image": _path, "question": _text, "answer": _text}
    optional: ClassVar = {"kind": _text}

    def __getitem__(self, index: int) -> Question:
        """Raises BadSample: the image cannot be read."""
        row = self.rows[index]
        question, answer, kind = (row.values.get(field, "") for field in ("question", "answer", "kind"))
        return Question(self._image(row, "image"), question, answer, row.name, kind)

    def answers(self) -> list[str]:
        """Those of the rows, each once, sorted."""
        return sorted({row.values["answer"] for row in self.rows})


class FileStatements(_File):
    """Rows {"left", "right", "sentence", "label", "kind"?}."""

    fields: ClassVar = {"left": _path, "right": _path, "sentence": _text, "label": _bool}
    optional: ClassVar = {"kind": _text}

    def __getitem__(self, index: int) -> Statement:
        """Raises BadSample: an image cannot be read."""
        row = self.rows[index]
        sentence, label, kind = (row.values.get(field, "") for field in ("sentence", "label", "kind"))
        return Statement(self._image(row, "left"), self._image(row, "right"), sentence, label, row.name, kind)


class FilePhrases(_File):
    """Rows {"image", "phrase", "box"?}."""

    fields: ClassVar = {"image": _path, "phrase": _text}
    optional: ClassVar = {"box": _box}

    def __getitem__(self, index: int) -> Phrase:
        """Raises BadSample: the image cannot be read. ValueError: the box reaches out of it."""
        row = self.rows[index]
        image, box = self._image(row, "image"), row.values.get("box")
        height, width, _ = image.shape
        if box and (box[2] > width or box[3] > height):
            raise ValueError(f"{row.name}: box must lie within the image of {width} x {height} pixels, got {list(box)}")
        return Phrase(image, row.values["phrase"], box, row.name)


def _open(spec: str, drawn: type, filed: type, image_size, channels: int, seed: int, count: int | None):
    if spec != "shapes":
        return filed(spec, count, channels)
    check_drawn(spec, channels)
    return drawn(COUNT if count is None else count, image_size, seed)


def _check_count(count: int | None) -> None:
    if count is not None:
        _checks.integer("count", count, 1)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines of a UTF-8 file that are not blank."""
    if not path.exists():
        raise FileNotFoundError(f"path must name a file, there is no {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path must name a file, {path} is a folder")
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} must be UTF-8: {error}") from None
            if text.strip():
                yield number, text
