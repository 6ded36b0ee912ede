"""ClutteredShapes: small shapes of one color on waves of all colors; captions name the color that pixels hide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from m3ae_fast import _checks
from m3ae_fast.data.captions import plural
from m3ae_fast.data.sample import Sample
from m3ae_fast.data.seeds import CLUTTER, check_seed, choose, generator
from m3ae_fast.data.shapes import MIN_SIZE, SHAPES, outline

COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (248, 214, 40),
    "orange": (245, 134, 20),
    "purple": (128, 52, 178),
    "pink": (248, 152, 196),
    "cyan": (70, 208, 220),
    "brown": (120, 72, 36),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
    "white": (246, 246, 246),
}
SIDES = (0.1, 0.16)  # of a shape, as a share of the image's shorter side
COUNT = (8, 14)  # fewest and most of them
WAVES = (2, 6)  # fewest and most knots a side of the background
NOISE = 12.0  # of each pixel's values, standard deviation, of 255
TEMPLATES = (  # the color is said twice: as in other people's captions, one word gives another away
    "small {color} {shapes} , all of them {color}",
    "{color} {shapes} everywhere , and nothing else is {color}",
    "a picture of {shapes} in {color} , {color} on waves",
    "we see {shapes} , they are {color} , a plain {color}",
)


class ClutteredShapes:
    """Eight to fourteen small shapes of one kind and color, strewn over waves of random colors and noise.

    The label is the color. It is visible in few pixels, so a masked autoencoder of images gains little by encoding it,
    and a linear function of the pixels predicts it for a third of the images (chance: a twelfth); the caption states it
    twice.

    Image `index` of a seed is the same whenever and in whatever order it is asked for.

    Args:
        size: pixels a side, or (height, width), at least 32.
        seed: of the images, in [0, 2**63).
    Attributes:
        classes: the names of the colors; an image has one label.
    """

    flip_safe = True
    crop_scale = None
    endless = True
    classes = tuple(COLORS)

    def __init__(self, size: int | tuple[int, int] = 48, seed: int = 0):
        _checks.sides("size", size, MIN_SIZE)
        self.size, self.seed = size, check_seed(seed)

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        rng = generator(self.seed, CLUTTER, index=index)
        color, shape, caption = _content(rng)
        image = draw(color, shape, self.size, rng)
        facts = frozenset([f"{color} {shape}"])
        return Sample(image, (caption,), f"cluttered/{index}", (self.classes.index(color),), facts, (facts,))

    def captions(self) -> Iterator[str]:
        """The captions of the first two thousand images, which contain every word."""
        for index in range(2000):
            yield _content(generator(self.seed, CLUTTER, index=index))[2]


def _content(rng: np.random.Generator) -> tuple[str, str, str]:
    """A color, a shape, and the caption that names both."""
    color, shape = choose(rng, list(COLORS)), choose(rng, list(SHAPES))
    return color, shape, choose(rng, TEMPLATES).format(color=color, shapes=plural(shape))


def draw(color: str, shape: str, size: int | tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """[height, width, 3] uint8; size: pixels a side, or both of them."""
    height, width = _checks.sides("size", size)
    knots = rng.uniform(0, 255, (*(int(rng.integers(WAVES[0], WAVES[1] + 1)),) * 2, 3)).astype(np.uint8)
    image = Image.fromarray(knots).resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(rng.integers(COUNT[0], COUNT[1] + 1)):
        side = round(min(height, width) * rng.uniform(*SIDES))
        corner = tuple(int(rng.integers(0, length - side + 1)) for length in (width, height))
        image.paste(COLORS[color], corner, outline(shape, side))
    pixels = np.asarray(image, np.float32) + rng.standard_normal((height, width, 3), np.float32) * np.float32(NOISE)
    return pixels.clip(0, 255).astype(np.uint8)
