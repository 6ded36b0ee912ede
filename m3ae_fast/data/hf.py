"""HFDataset: what Hugging Face datasets' save_to_disk wrote."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from m3ae_fast.data.arrow import ArrowRows, Column
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.images import open_image
from m3ae_fast.data.limits import MAX_BYTES, MAX_TEXT, open_file
from m3ae_fast.data.rows import parse_object
from m3ae_fast.data.sample import EncodedDataset, Sample, check_classes, clean_captions

INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"
CAPTIONS, LABELS = ("caption", "captions", "text"), ("label", "labels")


class HFDataset(EncodedDataset):
    """Rows of a folder that `datasets.Dataset.save_to_disk` wrote; neither datasets nor pyarrow is needed.

    Images are the column of datasets' `Image` feature (of several, the one called image): the bytes in a row or, where
    it has none, the file in this folder that its path names. Captions are the first of the columns `caption`,
    `captions`, `text` that holds strings or lists of them; labels the first of `label`, `labels` of `ClassLabel`, or
    lists of them, where -1 stands for none. Other columns are not read. Nothing of the folder is unpickled or run.

    Args:
        path: the folder; of a DatasetDict, that of one split. channels: of the images, 1 to 16.
    Attributes:
        classes: the names of the labels.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no such folder, holds neither images nor captions, or a file of it is damaged, compressed or
            lies elsewhere.
    """

    def __init__(self, path: str | os.PathLike, *, channels: int = 3):
        self.path, self.channels = Path(path), channels
        if not self.path.is_dir():
            raise FileNotFoundError(f"path must name a folder that datasets' save_to_disk wrote, there is no {path}")
        state, features = _described(self.path)
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise ValueError(f"{path} must be saved after flatten_indices(), got a selection of its rows")
        self._rows = ArrowRows([self.path / name for name in _files(self.path, state)])
        columns = self._rows.columns
        self._images = _image_column(path, features, columns)
        self._captions = _first(CAPTIONS, columns, ("text", "list of text"))
        labels = {name: _class_names(features.get(name)) for name in LABELS}
        self._labels = _first(filter(labels.get, LABELS), columns, ("int64", "list of int64"))
        if self._images is None and self._captions is None:
            held = ", ".join(f"{name} ({column})" for name, column in columns.items()) or "none"
            raise ValueError(
                f"path must hold an Image column, or {', '.join(CAPTIONS)} of text, got columns {held} in {path}"
            )
        if self._labels is not None:
            self.classes = labels[self._labels]
            check_classes(path, len(self.classes))
        if not len(self._rows):
            raise ValueError(f"path must hold at least one row, got none in {path}")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Sample:
        """The sample, its image still encoded. BadSample: the row cannot be read, or holds nothing."""
        name = f"{self.path.name}, row {index}"
        captions = clean_captions(name, self._cell(name, self._captions, index, MAX_TEXT))
        labels = self._classes(name, self._cell(name, self._labels, index, MAX_TEXT))
        image = self._cell(name, self._images, index, MAX_BYTES)
        if image is not None and image["bytes"] is not None:
            return Sample(open_image(image["bytes"], name, self.channels), captions, name, labels)
        if image is not None and image["path"]:
            file = open_image(self._inside(name, image["path"]), f"{name}: {image['path']}", self.channels)
            return Sample(file, captions, name, labels)
        if not captions:
            raise BadSample(name, "there is neither an image nor a word in it", "row")
        return Sample(None, captions, name, labels)

    def captions(self) -> Iterator[str]:
        """All captions, no image read; rows that cannot be read are left out here, and named where they are used."""
        for index in range(len(self) if self._captions else 0):
            try:
                yield from clean_captions("", self._cell("", self._captions, index, MAX_TEXT))
            except BadSample:
                continue

    def _cell(self, name: str, column: str | None, index: int, most: int):
        if column is None:
            return None
        try:
            return self._rows.cell(column, index, most)
        except (ValueError, OSError) as error:
            raise BadSample(name, f"{column}: {error}", "shard") from error

    def _classes(self, name: str, value: int | list | None) -> tuple[int, ...]:
        labels = [label for label in (value if isinstance(value, list) else [value]) if label not in (None, -1)]
        if not all(0 <= label < len(self.classes) for label in labels):
            raise BadSample(name, f"{self._labels} must be in [-1, {len(self.classes)}), got {value}", "label")
        return tuple(labels)

    def _inside(self, name: str, path: str) -> Path:
        """Where a row says that its image is. BadSample: outside the folder, by whichever links."""
        try:
            folder = self.path.resolve()
            found = (folder / path).resolve()
            if not found.is_relative_to(folder):
                raise ValueError(f"its image must lie in the folder, got {path}")
        except (ValueError, OSError, RuntimeError) as error:  # a NUL in a name, links that lead to themselves
            raise BadSample(name, str(error), "row") from None
        return found


def _described(folder: Path) -> tuple[dict, dict]:
    """What state.json says, and the features that dataset_info.json names."""
    if (folder / SPLITS).is_file() and not (folder / STATE).exists():
        splits = _json(folder / SPLITS).get("splits")
        named = ", ".join(map(str, splits)) if isinstance(splits, list) else ""
        raise ValueError(f"path must name the folder of a split, {folder} has several: {named}")
    missing = [name for name in (STATE, INFO) if not (folder / name).exists()]
    if missing:
        raise ValueError(f"path must name a folder that datasets' save_to_disk wrote, {folder} has no {missing[0]}")
    state, features = _json(folder / STATE), _json(folder / INFO).get("features")
    if not isinstance(features, dict):
        raise ValueError(f"{folder / INFO} must name features, got {type(features).__name__}")
    return state, features


def _json(path: Path) -> dict:
    with open_file(path) as file:
        text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise ValueError(f"{path} must have at most {MAX_TEXT:,} bytes")
    return parse_object(str(path), text)


def _files(folder: Path, state: dict) -> list[str]:
    """The names of the Arrow files, which lie in the folder itself."""
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        names = []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{folder / STATE} must name files in its folder as _data_files, got {names}")
    return names


def _first(names: Iterable[str], columns: dict[str, Column], kinds: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in columns and str(columns[name]) in kinds), None)


def _image_column(path: str | os.PathLike, features: dict, columns: dict[str, Column]) -> str | None:
    named = [n for n, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]
    named = [name for name in named if name in columns]
    if len(named) > 1 and "image" not in named:
        raise ValueError(f"{path} must have one Image column, or one that is called image, got {', '.join(named)}")
    if not named:
        return None
    name = "image" if "image" in named else named[0]
    if str(columns[name]) not in ("struct of bytes: bytes, path: text", "struct of path: text, bytes: bytes"):
        raise ValueError(f"{path}: {name} must be of bytes and a path, as datasets stores images, got {columns[name]}")
    return name


def _class_names(feature: object) -> tuple[str, ...]:
    """Those of a ClassLabel, or of a list of them; () for other features."""
    if isinstance(feature, list) and len(feature) == 1:  # a list of them, as datasets 1 wrote it
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    names = feature.get("names")
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
