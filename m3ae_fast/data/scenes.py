"""What a drawn image shows, in words and places."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """shape, color, size: words of SHAPES, COLORS, SIZES in `shapes`. box: (x0, y0, x1, y1) in pixels, x1 and y1 just
    outside; the object touches all four sides of it, and boxes of a scene never touch each other."""

    shape: str
    color: str
    size: str
    box: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A synthetic scene. background: a word of BACKGROUNDS. objects: one to four. captions: three true ones, from short
    to long. facts: everything that a caption could state about it. says: the facts that each caption states."""

    background: str
    objects: tuple[SceneObject, ...]
    captions: tuple[str, ...]
    facts: frozenset[str] = frozenset()
    says: tuple[frozenset[str], ...] = ()
