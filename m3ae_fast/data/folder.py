"""FolderDataset: name.jpg beside name.txt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from m3ae_fast.data.sample import BadSample, Sample

IMAGES = (".jpg", ".jpeg", ".png")
CAPTIONS = ".txt"


class FolderDataset:
    """Images and captions of a folder and its subfolders, sorted by path; hidden files and folders are left out.

    `name.jpg`, `.jpeg` or `.png` (any case) is an image; `name.txt` beside it holds its captions, one a line, UTF-8,
    blank lines ignored. An image whose text file is missing or blank is an image alone; a text file without an
    image is a text alone.

    Args:
        path: the folder.
    Attributes:
        classes: the names of its subfolders, where every file lies in one and there are two or more; else ().
        names: the files, relative to the folder, in the order of the indices: images, and texts alone.
    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it holds no image and no caption file.
    """

    flip_safe = True
    crop_scale = (0.2, 1.0)

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"path must name a folder, there is no {self.path}")
        if not self.path.is_dir():
            raise NotADirectoryError(f"path must name a folder, {self.path} is a file")
        files = sorted(_files(self.path))
        images = [name for name in files if name.lower().endswith(IMAGES)]
        self._texts: dict[str, str] = {}  # stem -> its caption file
        for name in files:
            if name.lower().endswith(CAPTIONS) and self._texts.setdefault(_stem(name), name) != name:
                raise ValueError(f"path must hold one {CAPTIONS} a name, got {self._texts[_stem(name)]} and {name}")
        alone = self._texts.keys() - set(map(_stem, images))
        self.names = sorted([*images, *(self._texts[stem] for stem in alone)])
        if not self.names:
            raise ValueError(f"path must hold {', '.join(f'name{e}' for e in (*IMAGES, CAPTIONS))}, got none in {path}")
        folders = [name.split("/")[0] if "/" in name else None for name in self.names]
        self.classes = () if None in folders or len(set(folders)) < 2 else tuple(sorted(set(folders)))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample: the file cannot be read, or holds nothing."""
        name = self.names[index]
        captions = self.captions_of(name)
        labels = (self.classes.index(name.split("/")[0]),) if self.classes else ()
        if name.lower().endswith(IMAGES):
            return Sample(read_image(self.path / name, name), captions, name, labels)
        if not captions:
            raise BadSample(name, "there is no caption in it, and no image beside it")
        return Sample(None, captions, name, labels)

    def captions(self) -> Iterator[str]:
        """All captions, no image read; files that cannot be read are left out here, and named where they are used."""
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
        BadSample: `name`, as the file is called in messages, cannot be read as UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSample(name, str(error)) from error
    return tuple(filter(None, map(str.strip, lines)))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _files(root: Path) -> Iterator[str]:
    """Relative paths, with / on every system, of all files that are not hidden."""

    def fail(error: OSError):
        raise error  # os.walk leaves out what it cannot list, and says nothing

    for folder, subfolders, files in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def read_image(path: Path, name: str) -> np.ndarray:
    """An image file as [H, W, 3] uint8, upright, transparency on white.

    Raises:
        BadSample: it cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise BadSample(name, str(error) or type(error).__name__) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's conversion clips, so that all but the darkest is white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
