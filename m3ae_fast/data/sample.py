"""What a data set returns, and how it says that it cannot."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from m3ae_fast.data.images import EncodedImage

MOST_CLASSES = 100_000  # a batch holds a flag for each class and sample


@dataclasses.dataclass(frozen=True, eq=False)  # no ==: comparing arrays gives an array
class Sample:
    """An image, its captions, or both.

    Attributes:
        image: [H, W, 3] uint8, or None; an EncodedImage in what a data set's `read` returns.
        captions: any number, of which training draws one at a time.
        labels: numbers of the classes it shows, in the data set's `classes`.
        name: what errors and warnings call it, a file's path within its folder for instance.
    """

    image: np.ndarray | EncodedImage | None
    captions: tuple[str, ...]
    name: str
    labels: tuple[int, ...] = ()


class BadSample(Exception):
    """A sample that cannot be read: its file is damaged, or holds neither an image nor a caption.

    Args:
        name: of the sample. reason: what is wrong with it.
        kind: what is damaged, for the counts: "image", "caption", "shard" (the file that holds it), "row", or "sample";
            or, where nothing is, why it is left out: "unpaired", "unlabelled".
    """

    def __init__(self, name: str, reason: str, kind: str = "sample"):
        super().__init__(name, reason, kind)  # all, so that it pickles
        self.name, self.reason, self.kind = name, reason, kind

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def clean_captions(name: str, value: object) -> tuple[str, ...]:
    """Captions as files hold them, a string or a list of several, bytes being UTF-8; blank ones are left out.

    Raises:
        BadSample: it is anything else; `name` is what the message calls the sample.
    """
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
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
