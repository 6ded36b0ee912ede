"""What a data set returns, and what those that read files have in common."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence

import numpy as np

from m3ae_fast.data.arrays import EncodedArray
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.images import EncodedImage

MOST_CLASSES = 100_000  # a batch holds a flag for each class and sample


@dataclasses.dataclass(frozen=True, eq=False)  # no ==: comparing arrays gives an array
class Sample:
    """An image, its captions, or both.

    Attributes:
        image: [H, W, C] uint8, or None; still encoded in what a data set's `read` returns.
        captions: any number, of which training draws one at a time.
        labels: numbers of the classes it shows, in the data set's `classes`.
        name: what errors and warnings call it, a file's path within its folder for instance.
        facts: what is known to be true of the image, in the data set's own words.
        says: for each caption the facts that it takes to be true: it is right for every image of the data set that has
            them all. Empty: a caption is known to be right for its own image alone.
    """

    image: np.ndarray | EncodedImage | EncodedArray | None
    captions: tuple[str, ...]
    name: str
    labels: tuple[int, ...] = ()
    facts: frozenset[str] = frozenset()
    says: tuple[frozenset[str], ...] = ()


class EncodedDataset:
    """What the data sets read from files have in common: `dataset[i]` is `dataset.read(i)` with its image decoded.

    `read(index)` returns the `Sample` with its image still encoded, so that the loader decodes only what it needs.
    `channels` is how many each image has.
    """

    flip_safe = True
    crop_scale = (0.2, 1.0)
    classes: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample: it cannot be read, or holds nothing. IndexError: outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        sample = self.read(index)
        if sample.image is None or isinstance(sample.image, np.ndarray):
            return sample
        return dataclasses.replace(sample, image=sample.image.decoded())


class Derived:
    """What data sets made of another one have in common: what is asked of a data set is answered as that one does.

    Args:
        dataset: of samples, which can be asked for by number.
    """

    def __init__(self, dataset: Sequence[Sample]):
        self.dataset = dataset
        self._read = getattr(dataset, "read", dataset.__getitem__)  # with its image still encoded, where that can be
        for name in ("classes", "no_classes", "flip_safe", "crop_scale", "damaged"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))

    def captions(self) -> Iterator[str]:
        """Those of the whole data set: a vocabulary does not depend on what is made of it."""
        return self.dataset.captions()


def caption_lines(name: str, data: bytes) -> tuple[str, ...]:
    """The captions of a text file: its lines, which end as everywhere, in \\n, \\r\\n or \\r; blank ones are left out.

    Raises:
        BadSample: they are no UTF-8; `name` is what the message calls the file.
    """
    try:
        lines = list(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample(name, str(error), "caption") from None
    return clean_captions(name, lines)


def clean_captions(name: str, value: object) -> tuple[str, ...]:
    """Captions as files hold them, a string or a list of several, bytes being UTF-8; None and blank ones are left out.

    Raises:
        BadSample: it is anything else; `name` is what the message calls the sample.
    """
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [] if value is None else [value]
    try:
        texts = [text.decode("utf-8") if isinstance(text, bytes) else str.strip(text) for text in values]
        for text in texts:
            text.encode("utf-8")  # half a surrogate pair, "\\ud83d" in JSON, is no text: tokenizers refuse it
    except (UnicodeError, TypeError) as error:
        raise BadSample(name, f"caption must be UTF-8 text, or a list of such: {error}", "caption") from None
    return tuple(filter(None, map(str.strip, texts)))


def check_classes(path: object, count: int) -> None:
    """ValueError: there are too many for what a file calls labels to be classes."""
    if count > MOST_CLASSES:
        raise ValueError(
            f"{path}: labels must be of at most {MOST_CLASSES:,} classes, numbered from 0, got {count:,}: are they ids?"
        )
