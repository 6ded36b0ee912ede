"""Questions about a drawn scene, whose answers are known and, within a kind, all equally likely."""

from __future__ import annotations

from collections import Counter

import numpy as np

from m3ae_fast.data.captions import NUMBERS, named
from m3ae_fast.data.scenes import Scene, SceneObject
from m3ae_fast.data.seeds import choose
from m3ae_fast.data.shapes import BACKGROUNDS, COLORS, MAX_OBJECTS, SHAPES

ANSWERS = sorted([*COLORS, *BACKGROUNDS, *SHAPES, *NUMBERS[1 : MAX_OBJECTS + 1], "yes", "no"])
Asked = tuple[str, str] | None  # question and answer; None: the scene has no answer to that kind


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """(question, answer, kind): of a kind drawn evenly from those that the scene has an answer to."""
    kinds = [list(QUESTIONS)[i] for i in rng.permutation(len(QUESTIONS))]
    return next((*asked, kind) for kind in kinds if (asked := QUESTIONS[kind](scene, rng)))


def only(scene: Scene, *attributes: str) -> list[SceneObject]:
    """The objects that no other one of the scene equals in all of these attributes."""

    def seen(item: SceneObject) -> tuple[str, ...]:
        return tuple(getattr(item, name) for name in attributes)

    counts = Counter(map(seen, scene.objects))
    return [item for item in scene.objects if counts[seen(item)] == 1]


def _color(scene: Scene, rng: np.random.Generator) -> Asked:
    items = only(scene, "shape")
    if not items:
        return None
    item = choose(rng, items)
    return f"what color is the {item.shape}?", item.color


def _shape(scene: Scene, rng: np.random.Generator) -> Asked:
    items = only(scene, "color")
    if not items:
        return None
    item = choose(rng, items)
    return f"what shape is the {item.color} thing?", item.shape


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    return "how many shapes are there?", NUMBERS[len(scene.objects)]


def _presence(scene: Scene, rng: np.random.Generator) -> Asked:
    if rng.random() < 0.5:
        item = choose(rng, scene.objects)
        return f"is there {named(item.color, item.shape)}?", "yes"
    return f"is there {named(*_absent(scene, rng))}?", "no"


def _absent(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """(color, shape) of no object, one word away from some: half the time both words are in the scene, where possible,
    so that it takes binding them to tell."""
    present = {(item.color, item.shape) for item in scene.objects}
    colors, shapes = ({getattr(item, name) for item in scene.objects} for name in ("color", "shape"))
    near = [(c, s) for c in COLORS for s in SHAPES if (c in colors or s in shapes) and (c, s) not in present]
    mixed = [(c, s) for c, s in near if c in colors and s in shapes]
    return choose(rng, mixed if mixed and rng.random() < 0.5 else near)


def _background(scene: Scene, rng: np.random.Generator) -> Asked:
    return "what color is the background?", scene.background


QUESTIONS = {"color": _color, "shape": _shape, "count": _count, "presence": _presence, "background": _background}
