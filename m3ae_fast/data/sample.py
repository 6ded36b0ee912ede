"""What a data set returns, and how it says that it cannot."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)  # no ==: comparing arrays gives an array
class Sample:
    """An image, its captions, or both.

    Attributes:
        image: [H, W, 3] uint8, or None.
        captions: any number, of which training draws one at a time.
        labels: numbers of the classes it shows, in the data set's `classes`.
        name: what errors and warnings call it, a file's path within its folder for instance.
    """

    image: np.ndarray | None
    captions: tuple[str, ...]
    name: str
    labels: tuple[int, ...] = ()


class BadSample(Exception):
    """A sample that cannot be read: its file is damaged, or holds neither an image nor a caption.

    Args:
        name: of the sample. reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it pickles
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
