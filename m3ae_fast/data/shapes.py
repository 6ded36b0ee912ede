"""ShapesDataset: synthetic scenes with captions that say what is in them, endless and known to the last pixel."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from m3ae_fast import _checks
from m3ae_fast.data.captions import describe
from m3ae_fast.data.sample import Sample
from m3ae_fast.data.scenes import Scene, SceneObject
from m3ae_fast.data.seeds import SCENE, check_seed, choose, generator

COLORS = {  # of objects: dark
    "red": (214, 40, 40),
    "green": (32, 132, 52),
    "blue": (38, 84, 214),
    "orange": (226, 110, 20),
    "purple": (128, 52, 178),
    "brown": (120, 72, 36),
    "black": (16, 16, 16),
}
BACKGROUNDS = {  # light: an object is always the darker, or else its shape takes many more images to be learned
    "white": (246, 246, 246),
    "yellow": (250, 222, 80),
    "pink": (250, 170, 208),
    "cyan": (110, 222, 232),
    "gray": (188, 188, 188),
}
SIZES = {"small": (0.2, 0.25), "large": (0.3, 0.36)}  # shortest and longest side, as a share of the image's
MAX_OBJECTS = 4
GAP = 0.05  # between two objects, as a share of the image's side: 1.5 pixels or more from MIN_SIZE up, so that
MIN_SIZE = 32  # rounding to pixels lets no two boxes touch
OVERSAMPLING = 4  # drawn this much larger, then averaged: smooth edges
PLACES = 64  # drawn for each object


class ShapesDataset:
    """One to four objects of dark colors on a plain light background, each of any shape and size, anywhere.

    Attributes are drawn independently of one another, so what a masked patch shows can be inferred from the caption,
    and often from nothing else. Scene `index` of a seed is the same whenever and in whatever order it is asked for, and
    the same scene at every image size of one aspect. Sizes are shares of the shorter side.

    Training neither mirrors nor crops these: captions mention left and right and every object, and every scene is new.

    Args:
        size: pixels a side, or (height, width), at least 32.
        seed: of the scenes, in [0, 2**63).
    Attributes:
        classes: shapes, then colors of objects; a scene's labels are those of its objects.
    """

    flip_safe = False
    crop_scale = None
    endless = True

    def __init__(self, size: int | tuple[int, int] = 256, seed: int = 0):
        height, width = _checks.sides("size", size, MIN_SIZE)
        self._unit = min(height, width)
        self._extent = width / self._unit, height / self._unit
        self.classes = (*SHAPES, *COLORS)
        self.size, self.seed = size, check_seed(seed)

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        shown = {word for item in scene.objects for word in (item.shape, item.color)}
        labels = tuple(i for i, word in enumerate(self.classes) if word in shown)
        name = f"shapes/{index}"
        return Sample(draw(scene, self.size), scene.captions, name, labels, scene.facts, scene.says)

    def captions(self) -> Iterator[str]:
        """The captions of the first two thousand scenes, which contain every word."""
        for index in range(2000):
            yield from self.scene(index).captions

    def scene(self, index: int) -> Scene:
        """What image `index` shows. IndexError: outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        rng = generator(self.seed, SCENE, index=index)
        background = choose(rng, list(BACKGROUNDS))
        sizes = [choose(rng, list(SIZES)) for _ in range(rng.integers(1, MAX_OBJECTS + 1))]
        boxes = _layout(rng, np.array([rng.uniform(*SIZES[size]) for size in sizes]), self._extent)
        objects = []
        for size, (x, y, side) in zip(sizes, np.rint(boxes * self._unit).astype(int).tolist(), strict=True):
            box = (x, y, x + side, y + side)
            objects.append(SceneObject(choose(rng, list(SHAPES)), choose(rng, list(COLORS)), size, box))
        return Scene(background, tuple(objects), *describe(background, objects, boxes, rng, self._extent))


def _layout(rng: np.random.Generator, sides: np.ndarray, extent: tuple[float, float]) -> np.ndarray:
    """(x, y, side) of objects that keep GAP from one another and from the edges, in shares of the image's shorter side,
    of which the image is `extent` wide and high.

    Each takes the first of PLACES random places that is free; where none is, all start again with the same sizes,
    since smaller ones would make small objects likelier in company.
    """
    boxes = np.empty((len(sides), 3))
    boxes[:, 2] = sides
    placed = 0
    while placed < len(sides):
        side, others = sides[placed], boxes[:placed]
        corner = GAP + rng.random((PLACES, 1, 2)) * (np.array(extent) - 2 * GAP - side)
        low, high = others[:, :2] - GAP, others[:, :2] + others[:, 2:] + GAP
        free = ((corner + side <= low) | (corner >= high)).any(-1).all(-1)
        if free.any():
            boxes[placed, :2] = corner[free.argmax(), 0]
            placed += 1
        else:
            placed = 0
    return boxes


def draw(scene: Scene, size: int | tuple[int, int]) -> np.ndarray:
    """The scene as [height, width, 3] uint8; size: pixels a side, or both of them."""
    height, width = _checks.sides("size", size)
    image = Image.new("RGB", (width, height), BACKGROUNDS[scene.background])
    for item in scene.objects:
        image.paste(COLORS[item.color], item.box, outline(item.shape, item.box[2] - item.box[0]))
    return np.asarray(image)


def check_drawn(spec: str, channels: int) -> None:
    """ValueError: images of other channels are wanted than the three of what is drawn."""
    if channels != 3:
        raise ValueError(f"data must have {channels} channels, as the model takes, got 3 in {spec}")


@functools.lru_cache(1024)  # 8 shapes of up to 128 sides: 12 MB at most where images are 256 pixels wide
def outline(shape: str, side: int) -> Image.Image:
    """How much of each pixel a shape covers, 0 to 255: mode "L", `side` pixels a side."""
    mask = Image.new("L", (OVERSAMPLING * side,) * 2)
    SHAPES[shape](ImageDraw.Draw(mask), OVERSAMPLING * side - 1)
    return mask.reduce(OVERSAMPLING)


def _polygon(*points: tuple[float, float]):
    """A drawing function for corners given in the unit square."""
    return lambda pen, last: pen.polygon([(x * last, y * last) for x, y in points], fill=255)


def _outline(curve: list[tuple[float, float]]):
    """The same for any closed curve, stretched to touch all four sides."""
    points = np.array(curve)
    low, high = points.min(0), points.max(0)
    return _polygon(*((points - low) / (high - low)).tolist())


def _turns(count: int) -> list[float]:
    return [2 * math.pi * i / count for i in range(count)]


def _circle(pen: ImageDraw.ImageDraw, last: float) -> None:
    pen.ellipse((0, 0, last, last), fill=255)


def _ring(pen: ImageDraw.ImageDraw, last: float) -> None:
    _circle(pen, last)
    pen.ellipse((0.26 * last, 0.26 * last, 0.74 * last, 0.74 * last), fill=0)


def _heart(t: float) -> tuple[float, float]:
    across = 16 * math.sin(t) ** 3
    down = -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)
    return across, down


def _star(corner: int, t: float) -> tuple[float, float]:
    radius = 1 if corner % 2 == 0 else 0.42
    return radius * math.sin(t), -radius * math.cos(t)


A, B = 0.31, 0.69  # the arms of the cross
SHAPES = {
    "circle": _circle,
    "square": _polygon((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": _polygon((0.5, 0), (1, 1), (0, 1)),
    "diamond": _polygon((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": _polygon(
        *((A, 0), (B, 0), (B, A), (1, A), (1, B), (B, B)), *((B, 1), (A, 1), (A, B), (0, B), (0, A), (A, A))
    ),
    "ring": _ring,
    "star": _outline([_star(i, t) for i, t in enumerate(_turns(10))]),
    "heart": _outline([_heart(t) for t in _turns(48)]),
}
