"""FolderDataset: name.jpg beside name.txt."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.images import ARRAYS, IMAGES, OTHERS, not_read, open_image, suffix_of
from m3ae_fast.data.limits import MAX_TEXT, check_size, open_file
from m3ae_fast.data.sample import EncodedDataset, Sample, caption_lines

CAPTIONS = ".txt"
SPLITS = {"train", "val", "valid", "validation", "test"}


class FolderDataset(EncodedDataset):
    """Images and captions of a folder and its subfolders, sorted by path; hidden files and folders are left out.
    Links are followed, but for those to a folder that they lie in.

    `name.jpg`, `.png` or another of `images.IMAGES` (any case) is an image; `name.txt` beside it holds its captions,
    one a line, UTF-8, blank lines ignored. Where there is no such image in the whole folder, `name.npy` is one, of any
    channels (`EncodedArray`). An image whose text file is missing or blank is an image alone; a text file
    without an image is a text alone. An image of another kind, one of `images.OTHERS`, is a damaged sample, unless one
    that can be read is beside it.

    Args:
        path: the folder. channels: of the images, 1 to 16.
    Attributes:
        classes: the names of its subfolders, sorted and numbered as torchvision's ImageFolder does, where every image
            lies in one and there are two or more; () otherwise, and where they are called train, val, test: each of
            those is a data set of its own. A text beside the subfolders, README.txt for instance, is then left out,
            with a warning.
        no_classes: which image lies beside the subfolders, where classes are () for it; "" otherwise.
        names: the files, relative to the folder, in the order of the indices: images, and texts alone.
    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it holds no image and no caption file.
    """

    def __init__(self, path: str | os.PathLike, *, channels: int = 3):
        self.path, self.channels = Path(path), channels
        if not self.path.exists():
            raise FileNotFoundError(f"path must name a folder, there is no {self.path}")
        if not self.path.is_dir():
            raise NotADirectoryError(f"path must name a folder, {self.path} is a file")
        files = sorted(_files(self.path))
        images = [name for name in files if suffix_of(name) in IMAGES]
        images = images or [name for name in files if suffix_of(name) == ARRAYS]
        stems = set(map(_stem, images))
        others = [name for name in files if suffix_of(name) in OTHERS and _stem(name) not in stems]
        self._texts: dict[str, str] = {}  # stem -> its caption file
        for name in files:
            if name.lower().endswith(CAPTIONS) and self._texts.setdefault(_stem(name), name) != name:
                raise ValueError(f"path must hold one {CAPTIONS} a name, got {self._texts[_stem(name)]} and {name}")
        alone = self._texts.keys() - stems.union(map(_stem, others))
        self.names = sorted([*images, *others, *(self._texts[stem] for stem in alone)])
        if not self.names:
            raise ValueError(f"path must hold {', '.join(f'name.{e}' for e in (*IMAGES, 'txt'))}, got none in {path}")
        self.classes, self.no_classes = _classes(self.names)
        self._numbers = {name: number for number, name in enumerate(self.classes)}
        beside = [name for name in self.names if self.classes and not _top(name)]
        if beside:
            self.names = [name for name in self.names if _top(name)]
            message = f"{path}: left out, since they are in no folder of a class: {', '.join(beside[:5])}"
            warnings.warn(f"{message}{', ...' if len(beside) > 5 else ''}", M3AEFastWarning, stacklevel=2)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Sample:
        """The sample, its image still encoded. BadSample: the file cannot be read, or holds nothing."""
        name = self.names[index]
        if suffix_of(name) in OTHERS:
            raise BadSample(name, not_read(suffix_of(name)), "image")
        captions = self.captions_of(name)
        labels = (self._numbers[_top(name)],) if self.classes else ()
        if is_image(name):
            return Sample(open_image(self.path / name, name, self.channels), captions, name, labels)
        if not captions:
            raise BadSample(name, "there is no caption in it, and no image beside it", "caption")
        return Sample(None, captions, name, labels)

    def captions(self) -> Iterator[str]:
        """All captions, without reading images; files that cannot be read are skipped here, and reported when they are
        used."""
        for name in self.names:
            try:
                yield from self.captions_of(name)
            except BadSample:
                continue

    def captions_of(self, name: str) -> tuple[str, ...]:
        """Those of one of `names`, no image read; BadSample: its caption file cannot be read."""
        text = self._texts.get(_stem(name))
        if text is None:
            return ()
        return read_captions(self.path / text, text)


def read_captions(path: Path, name: str) -> tuple[str, ...]:
    """The lines of a caption file that are not blank.

    Raises:
        BadSample: `name`, as the file is called in messages, is no UTF-8, no regular file, or larger than MAX_TEXT.
    """
    try:
        with open_file(path) as file:
            data = file.read(MAX_TEXT + 1)
        check_size(len(data), MAX_TEXT)
    except (OSError, ValueError) as error:
        raise BadSample(name, str(error), "caption") from error
    return caption_lines(name, data)


def is_image(name: str) -> bool:
    """Whether one of a folder's `names` is an image, not a text alone."""
    return suffix_of(name) in (*IMAGES, ARRAYS)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _top(name: str) -> str:
    """The subfolder that a file lies in, however deep: "" for none."""
    return name.split("/")[0] if "/" in name else ""


def _classes(names: list[str]) -> tuple[tuple[str, ...], str]:
    """Those of the files, and the image that lies beside their folders, where there are none for it."""
    folders = sorted(set(map(_top, names)) - {""})
    if len(folders) < 2 or SPLITS.issuperset(folders):
        return (), ""
    beside = next((name for name in names if not _top(name) and is_image(name)), "")
    return ((), beside) if beside else (tuple(folders), "")


def _files(root: Path, folder: str = "", above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Relative paths, with / on every system, of all files that are not hidden. above: the folders it lies in."""
    here = os.path.realpath(root / folder)
    if here in above:  # a link back: without end
        return
    for entry in os.scandir(root / folder):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _files(root, f"{folder}{entry.name}/", above | {here})
        else:
            yield folder + entry.name


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that cannot be read
        return False
