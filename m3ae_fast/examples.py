"""One example of each task. Images are [H, W, C] uint8; `name` is what errors and pictures call the example."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)  # no ==: comparing arrays gives an array
class Question:
    """A question about an image. answer: the right one. name: what errors call it. kind: questions that are scored
    together, "color" for instance."""

    image: np.ndarray
    question: str
    answer: str
    name: str
    kind: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Statement:
    """A sentence about two images, left and right. label: whether it is true of them. name: what errors call it. kind:
    statements that are scored together."""

    left: np.ndarray
    right: np.ndarray
    sentence: str
    label: bool
    name: str
    kind: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Phrase:
    """A phrase and the image to find it in. box: where it is, (x0, y0, x1, y1) in pixels of `image`, x1 and y1 just
    outside; None: not known, so that a picture can be drawn and nothing scored. name: what errors call it. objects: how
    many things the image shows, of which one is the phrase's; None: not known."""

    image: np.ndarray
    phrase: str
    box: tuple[int, int, int, int] | None
    name: str
    objects: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """An image and its captions, one or more, each of which is a right one. name: what errors call it."""

    image: np.ndarray
    captions: tuple[str, ...]
    name: str
