"""Statements about two synthetic scenes: first the words, then scenes of which they are true or false, as asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from m3ae_fast.data.captions import NUMBERS, named
from m3ae_fast.data.scenes import Scene
from m3ae_fast.data.seeds import choose
from m3ae_fast.data.shapes import BACKGROUNDS, COLORS, MAX_OBJECTS, SHAPES

SIDES = ("left", "right")
TOTALS = {n: word for n, word in enumerate((*NUMBERS, "five")) if n > 1}  # no caption has the x of six
COUNTS = range(1, MAX_OBJECTS + 1)


class Drawing(NamedTuple):
    """How an example of a sentence is drawn.

    Attributes:
        label: whether the sentence is to be true.
        rng: of this example alone.
        find: the first scene that fits, from a random one on.
    """

    label: bool
    rng: np.random.Generator
    find: Callable[[Callable[[Scene], bool]], Scene]

    def new(self, count: int | None = None) -> Scene:
        """A scene, of `count` objects where given; without captions: they may not be true of what becomes of it."""
        scene = self.find(lambda scene: len(scene.objects) >= (count or 0))
        return dataclasses.replace(scene, objects=scene.objects[:count], captions=())

    def coin(self) -> bool:
        """True half of the time."""
        return bool(self.rng.integers(2))


Said = tuple[str, tuple[Scene, Scene]]  # sentence, left and right


def state(words: np.random.Generator, drawing: Drawing) -> tuple[str, tuple[Scene, Scene], str]:
    """(sentence, (left, right), kind). The words depend on `words` alone, not on the drawing: a generator in the same
    state gives the same sentence to a true and to a false example."""
    kind = choose(words, list(STATEMENTS))
    return *STATEMENTS[kind](words, drawing), kind


def _both(words: np.random.Generator, drawing: Drawing) -> Said:
    color, shape = choose(words, list(COLORS)), choose(words, list(SHAPES))
    rng = drawing.rng
    one, other = _with(drawing.new(), rng, shape, color), drawing.new()
    if drawing.label:
        other = _with(other, rng, shape, color)
    elif drawing.coin():
        other = _without(_with(other, rng, shape, _other(rng, COLORS, color)), rng, shape, color)
    else:
        other = _without(_with(other, rng, _other(rng, SHAPES, shape), color), rng, shape, color)
    return f"both images contain {named(color, shape)}", _order(one, other, drawing.coin())


def _presence(words: np.random.Generator, drawing: Drawing) -> Said:
    side, shape = choose(words, SIDES), choose(words, list(SHAPES))
    about, other = ((_with if has else _without)(drawing.new(), drawing.rng, shape) for has in _has(drawing))
    return f"there is {named(shape)} in the {side} image", _order(about, other, side == "right")


def _background(words: np.random.Generator, drawing: Drawing) -> Said:
    side, color = choose(words, SIDES), choose(words, list(BACKGROUNDS))
    colors = (color if has else _other(drawing.rng, BACKGROUNDS, color) for has in _has(drawing))
    about, other = (dataclasses.replace(drawing.new(), background=each) for each in colors)
    return f"the background of the {side} image is {color}", _order(about, other, side == "right")


def _more(words: np.random.Generator, drawing: Drawing) -> Said:
    side = words.integers(2)
    more, fewer = choose(drawing.rng, [(a, b) for a in COUNTS for b in COUNTS if (a > b) == drawing.label])
    sentence = f"the {SIDES[side]} image contains more shapes than the {SIDES[1 - side]} image"
    return sentence, _order(drawing.new(more), drawing.new(fewer), side == 1)


def _total(words: np.random.Generator, drawing: Drawing) -> Said:
    said = choose(words, list(TOTALS))
    total = choose(drawing.rng, [said] if drawing.label else [n for n in (said - 1, said + 1) if n > 1])
    left = choose(drawing.rng, [n for n in COUNTS if total - n in COUNTS])
    return f"the images contain {TOTALS[said]} shapes in total", (drawing.new(left), drawing.new(total - left))


STATEMENTS = {"both": _both, "presence": _presence, "background": _background, "more": _more, "total": _total}


def _has(drawing: Drawing) -> tuple[bool, bool]:
    """Whether the image that is spoken of has it, and whether the other one does: which must tell nothing."""
    return drawing.label, drawing.coin()


def _order(first: Scene, second: Scene, turned: bool) -> tuple[Scene, Scene]:
    return (second, first) if turned else (first, second)


def _other(rng: np.random.Generator, options: dict, but: str) -> str:
    return choose(rng, [option for option in options if option != but])


def _with(scene: Scene, rng: np.random.Generator, shape: str, color: str | None = None) -> Scene:
    """The scene, one of its objects of this shape, and of this color where one is given."""
    items = list(scene.objects)
    i = rng.integers(len(items))
    items[i] = dataclasses.replace(items[i], shape=shape, color=color or items[i].color)
    return dataclasses.replace(scene, objects=tuple(items))


def _without(scene: Scene, rng: np.random.Generator, shape: str, color: str | None = None) -> Scene:
    """The scene, no object of this shape (and color, where one is given): those that were are of other shapes."""
    items = tuple(
        dataclasses.replace(item, shape=_other(rng, SHAPES, shape))
        if item.shape == shape and color in (None, item.color)
        else item
        for item in scene.objects
    )
    return dataclasses.replace(scene, objects=items)
