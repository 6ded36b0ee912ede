"""HDF5Dataset: the files that the paper's public code reads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from m3ae_fast import _checks
from m3ae_fast.data.arrays import as_pixels, channels_first
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.columns import Column
from m3ae_fast.data.images import open_image
from m3ae_fast.data.limits import open_file
from m3ae_fast.data.sample import EncodedDataset, Sample, check_classes, clean_captions

# The names of (images, captions, labels) in a file, for each split; the first with images that is there counts.
LAYOUTS = {
    None: (("jpg", "caption", None), ("image", "caption", "label"), (None, "text", None)),
    "train": (("train_jpg", None, "train_labels"),),
    "val": (("val_jpg", None, "val_labels"),),
}


MAX_ROWS = 2**31 - 1
MAX_LABELS = 1 << 27  # rows: labels are read as a whole
MAX_LINKS = 8  # that lead to a column, one after the other


class HDF5Dataset(EncodedDataset):
    """Rows of `jpg` (encoded images, a variable-length uint8 array each) and `caption` (strings), or of `text` alone;
    of ImageNet's file, `train_jpg` and `train_labels`, or `val_jpg` and `val_labels`; of pixels, `image` ([C, H, W],
    [H, W, C] or [H, W] uint8 each), with `caption`, `label` (a class's number) or neither.

    Without `caption`, images alone. The file is opened anew in each process that reads it. It must hold its columns
    itself: what lies in other files is not read.

    Args:
        path: the file.
        split: "train" or "val" of a file that holds both; None of any other.
        channels: of the images, 1 to 16; where both the first and the last axis of pixels have so many, the last.
    Attributes:
        classes: "0" to the largest of the labels.
    Raises:
        FileNotFoundError: there is no such file. ModuleNotFoundError: h5py is missing.
        ValueError: it is no HDF5 file, holds none of those, columns of different lengths, labels that are none, pixels
            of other channels or no uint8, or columns that lie elsewhere, have other filters than gzip, shuffle and
            fletcher32, or rows or chunks that unpack to more than 256 MiB.
    Source: github.com/young-geng/m3ae_public (arXiv:2205.14204).
    """

    def __init__(self, path: str | os.PathLike, split: str | None = None, *, channels: int = 3):
        _checks.choice("split", split, tuple(LAYOUTS))
        self.path, self.split, self.channels = Path(path), split, channels
        self._file, self._process, self._columns = None, None, {}
        with _open(self.path) as file, open_file(self.path) as descriptor:
            try:
                self._look(file, descriptor.fileno())
            except (OSError, RuntimeError, KeyError, TypeError) as error:  # of h5py, where the file is damaged
                raise ValueError(f"{path} cannot be read: {error}") from error

    def _look(self, file, descriptor: int) -> None:
        """Find out what is in the file, and read its labels."""
        path, split, there = self.path, self.split, set(file)
        found = [[name if name in there else None for name in names] for names in LAYOUTS[split]]
        found = [names for names in found if names[0] or names[1]]
        if not found:
            wanted = " or ".join("/".join(filter(None, names)) for names in LAYOUTS[split])
            hint = "; its split, train or val, must be named" if there & {"train_jpg", "val_jpg"} else ""
            held = ", ".join(sorted(there)) or "nothing"
            raise ValueError(f"path must hold {wanted}, got {held} in {path}{hint}")
        names = next((names for names in found if names[0]), found[0])
        self._images, self._captions, self._labels = names
        columns = {name: _column(file, name, descriptor) for name in names if name}
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{path} must hold columns of one length, got {lengths}")
        self._length = next(iter(lengths.values()))
        self._pixels = self._shape_of_pixels(columns.get(self._images))
        if self._labels and self._length:
            name, labels = self._labels, columns[self._labels]
            if labels.dtype.kind not in "iu" or math.prod(labels.shape) != self._length:
                got = f"{labels.dtype} {list(labels.shape)}"
                raise ValueError(f"{path}: {name} must hold a class's number in each row, got {got}")
            if self._length > MAX_LABELS:
                raise ValueError(f"{path}: {name} must have at most {MAX_LABELS:,} rows, got {self._length:,}")
            self._labels = labels.rows(0, self._length).view(labels.dtype).astype(np.int64).reshape(self._length)
            if self._labels.min() < 0:
                raise ValueError(f"{path}: {name} must not be negative, got {self._labels.min()}")
            check_classes(f"{path}: {name}", int(self._labels.max()) + 1)
            self.classes = tuple(map(str, range(self._labels.max() + 1)))
        if not self._length:
            raise ValueError(f"path must hold at least one row, got none in {path}")

    def _shape_of_pixels(self, column: Column | None) -> tuple[int, ...] | None:
        """That of each row, where rows are not encoded. ValueError: they are no such images as are wanted."""
        if column is None or len(column.shape) < 3:
            return None
        name = f"{self.path}: {self._images}"
        if column.dtype != np.uint8 or 0 in column.shape[1:]:
            got = f"{column.dtype} {list(column.shape[1:])}"
            raise ValueError(f"{name} must have pixels of uint8 in each row, scaled to 0 .. 255, got {got}")
        try:
            channels_first(name, column.shape[1:], self.channels)
        except BadSample as bad:
            raise ValueError(str(bad)) from None
        return column.shape[1:]

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Sample:
        """The sample, its image still encoded. BadSample: the row cannot be read, or holds nothing."""
        name = f"{self.path.name}{f':{self.split}' if self.split else ''}, row {index}"
        captions = clean_captions(name, self._cell(name, self._captions, index)) if self._captions else ()
        if self._images is None:
            if not captions:
                raise BadSample(name, "there is no word in its text", "caption")
            return Sample(None, captions, name)
        labels = () if self._labels is None else (int(self._labels[index]),)
        cell = self._cell(name, self._images, index)
        if self._pixels:
            first = channels_first(name, self._pixels, self.channels)
            return Sample(as_pixels(cell.reshape(self._pixels), first), captions, name, labels)
        image = cell if isinstance(cell, bytes) else np.asarray(cell).tobytes()
        return Sample(open_image(image, name, self.channels), captions, name, labels)

    def captions(self) -> Iterator[str]:
        """All captions, no image read; rows that cannot be read are left out here, and named where they are used."""
        for index in range(len(self) if self._captions else 0):
            try:
                yield from clean_captions("", self._cell("", self._captions, index))
            except BadSample:
                continue

    def _cell(self, name: str, column: str, index: int):
        try:
            if self._process != os.getpid():  # a handle does not survive a fork
                self._file, self._bytes = _open(self.path), open_file(self.path)
                names = filter(None, (self._images, self._captions))
                self._columns = {name: _column(self._file, name, self._bytes.fileno()) for name in names}
                self._process = os.getpid()
            return self._columns[column][index]
        except MemoryError:
            raise
        except Exception as error:  # of a damaged file, h5py raises OSError, KeyError, RuntimeError, TypeError ...
            raise BadSample(name, f"{column}: {error}", "shard") from error

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_bytes": None, "_process": None, "_columns": {}}


def _column(file, name: str, descriptor: int) -> Column:
    """A column: a data set with rows, stored in the file itself. ValueError: there is none."""
    found = _inside(file, name)
    if not getattr(found, "shape", ()):  # a group has none, a single value has ()
        raise ValueError(f"{file.filename}: {name} must be a column, a data set with rows, got {found!r}")
    if found.external or found.is_virtual:
        raise ValueError(f"{file.filename}: {name} must be stored in the file itself, got one that lies in others")
    if found.shape[0] > MAX_ROWS:  # rows that were never written take no space
        raise ValueError(f"{file.filename}: {name} must have at most {MAX_ROWS:,} rows, got {found.shape[0]:,}")
    try:
        return Column(found, descriptor)
    except ValueError as error:
        raise ValueError(f"{file.filename}: {name} cannot be read: {error}") from None


def _inside(file, name: str):
    """What has a name, or is linked to, in the file. ValueError: a link leads out of it, or nowhere."""
    import h5py

    node, parts, links = file, [name], 0
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if isinstance(link, h5py.HardLink):
            node = node[part]
            continue
        links += 1
        if not isinstance(link, h5py.SoftLink) or links > MAX_LINKS:
            raise ValueError(f"{file.filename}: {name} must be stored in the file itself, got a link that leads "
                             f"{'out of it' if isinstance(link, h5py.ExternalLink) else 'nowhere'}")  # fmt: skip
        node = file if link.path.startswith("/") else node
        parts += reversed(link.path.split("/"))
    return node


def _open(path: Path):
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path}: HDF5 needs h5py: pip install '.[train]'", name="h5py") from error
    if not path.is_file():
        raise FileNotFoundError(f"path must name an HDF5 file, there is no {path}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"path must name an HDF5 file, {path} cannot be read as one: {error}") from error
