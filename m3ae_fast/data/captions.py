"""The sentences of a scene: true of it, whichever words are drawn."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from m3ae_fast.data.scenes import SceneObject
from m3ae_fast.data.seeds import choose

NUMBERS = ("no", "one", "two", "three", "four")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")  # thirds of the image, by an object's middle


def describe(
    background: str,
    objects: Sequence[SceneObject],
    boxes: np.ndarray,
    rng: np.random.Generator,
    extent: tuple[float, float],
) -> tuple[str, str, str]:
    """A short caption (one object, or how many), a middling one (a place or a relation), and one that names all.

    Args:
        background: its colour.
        objects: one to four.
        boxes: (x, y, side) of each, in shares of the image's shorter side: so the words do not depend on its pixels.
        rng: draws the wording.
        extent: the image's width and height, in the same unit.
    """

    pick = functools.partial(choose, rng)
    ground = f"{named(background)} background"

    def sentence(text: str) -> str:
        opening = pick(("we see", "this shows", "a picture of"))
        return pick(
            (f"{text} on {ground}", f"{text} on {background}", f"{opening} {text} on {ground}", f"on {ground}, {text}")
        )

    order = rng.permutation(len(objects))
    objects, boxes = [objects[i] for i in order], boxes[order].tolist()
    names = [named(item.size, item.color, item.shape) for item in objects]
    placed = [f"{name} {_place(box, extent)}" for name, box in zip(names, boxes, strict=True)]
    pairs = [
        f"{names[i]} {_relation(boxes[i], boxes[i + 1], pick)} {names[i + 1]}" for i in range(0, len(names) - 1, 2)
    ]

    short = [named(objects[0].color, objects[0].shape), _count(objects), _groups(objects)]
    medium = [placed[0], *pairs[:1]]
    everything = [_series(names)]
    if len(names) <= 3:  # four places make a caption of over thirty words
        everything.append(_series(placed))
    if pairs:
        everything.append(", and ".join(pairs + names[2 * len(pairs) :]))
    return sentence(pick(short)), sentence(pick(medium)), sentence(pick(everything))


def named(*words: str) -> str:
    """Words behind "a" or "an": "an orange star"."""
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def plural(shape: str) -> str:
    """ "crosses", "stars"."""
    return f"{shape}{'es' if shape[-1] == 's' else 's'}"


def _series(items: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _count(objects: Sequence[SceneObject]) -> str:
    return f"{NUMBERS[len(objects)]} shape{'s' if len(objects) > 1 else ''}"


def _groups(objects: Sequence[SceneObject]) -> str:
    """ "two crosses and a star"."""
    counts = Counter(item.shape for item in objects)
    return _series([named(shape) if n == 1 else f"{NUMBERS[n]} {plural(shape)}" for shape, n in counts.items()])


def _place(box: Sequence[float], extent: tuple[float, float]) -> str:
    (x, y, side), (width, height) = box, extent
    row, column = ROWS[int(3 * (y + side / 2) / height)], COLUMNS[int(3 * (x + side / 2) / width)]
    if row and column:
        return f"in the {row} {column} corner"
    if row or column:
        return f"at the {row}" if row else f"on the {column}"
    return "in the center"


def _relation(a: Sequence[float], b: Sequence[float], pick: Callable[[Sequence[str]], str]) -> str:
    """One of the true ones: boxes that do not overlap are apart in at least one direction."""
    (ax, ay, a_side), (bx, by, b_side) = a, b
    true = {
        "above": ay + a_side <= by,
        "below": by + b_side <= ay,
        "to the left of": ax + a_side <= bx,
        "to the right of": bx + b_side <= ax,
    }
    return pick([words for words, holds in true.items() if holds])
