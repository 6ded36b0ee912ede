"""The sentences of a scene: true of it, whichever words are drawn."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from m3ae_fast.data.scenes import SceneObject
from m3ae_fast.data.seeds import choose

Facts = frozenset[str]
NUMBERS = ("no", "one", "two", "three", "four")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")  # thirds of the image, by an object's middle


def describe(
    background: str,
    objects: Sequence[SceneObject],
    boxes: np.ndarray,
    rng: np.random.Generator,
    extent: tuple[float, float],
) -> tuple[tuple[str, ...], Facts, tuple[Facts, ...]]:
    """A short caption (one object, or how many), a middling one (a place or a relation), and one that names all.

    A caption is true of every scene that has the facts it says. Three stars are the facts "star 1" to "star 3", so that
    two of them are among these.

    Args:
        background: its color.
        objects: one to four.
        boxes: (x, y, side) of each, in shares of the image's shorter side: so the words do not depend on its pixels.
        rng: draws the wording.
        extent: the image's width and height, in the same unit.

    Returns:
        (captions, facts of the scene, what each caption says).
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
    colored = [named(item.color, item.shape) for item in objects]
    placed = [f"{name} {_place(box, extent)}" for name, box in zip(names, boxes, strict=True)]
    related = {
        (i, j): [f"{names[i]} {relation} {names[j]}" for relation in _relations(boxes[i], boxes[j])]
        for i, j in itertools.permutations(range(len(names)), 2)
    }
    pairs = [pick(related[i, i + 1]) for i in range(0, len(names) - 1, 2)]
    shapes = numbered(item.shape for item in objects)

    short = [(colored[0], {colored[0]}), (_count(objects), {_count(objects)}), (_groups(objects), shapes)]
    medium = [(text, {text}) for text in (placed[0], *pairs[:1])]
    everything = [(_series(names), numbered(names))]
    if len(names) <= 3:  # four places make a caption of over thirty words
        everything.append((_series(placed), numbered(placed)))
    if pairs:
        everything.append((", and ".join(pairs + names[2 * len(pairs) :]), numbered(names) | set(pairs)))
    told = [(sentence(text), frozenset([ground, *says])) for text, says in map(pick, (short, medium, everything))]
    facts = shapes | numbered(names) | numbered(placed) | {ground, _count(objects), *colored, *placed}
    captions, says = zip(*told, strict=True)
    return captions, facts.union(*related.values()), says


def numbered(words: Iterable[str]) -> Facts:
    """ "star 1", "star 2" and "cross 1" of two stars and a cross."""
    return frozenset(f"{word} {i + 1}" for word, count in Counter(words).items() for i in range(count))


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


def _relations(a: Sequence[float], b: Sequence[float]) -> list[str]:
    """The true ones: boxes that do not overlap are apart in at least one direction."""
    (ax, ay, a_side), (bx, by, b_side) = a, b
    true = {
        "above": ay + a_side <= by,
        "below": by + b_side <= ay,
        "to the left of": ax + a_side <= bx,
        "to the right of": bx + b_side <= ax,
    }
    return [words for words, holds in true.items() if holds]
