"""Crops: an image in, [size, size, 3] uint8 out, bicubic by Pillow."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from m3ae_fast.data.images import Box, EncodedImage, resize

RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
ATTEMPTS = 10


def crop(image: np.ndarray | EncodedImage, box: Box, size: int) -> np.ndarray:
    """What is in the box, resized to [size, size, 3] uint8; of a decoded image that needs no resizing, a view.

    Args:
        image: [H, W, 3] uint8, or still encoded.
        box: x0, y0, x1, y1 in pixels. size: pixels a side of the result.
    """
    if isinstance(image, EncodedImage):
        return image.resized(box, size)
    x0, y0, x1, y1 = box
    if (y1 - y0, x1 - x0) == (size, size):
        return image[y0:y1, x0:x1]
    return resize(Image.fromarray(image), box, size)


def center_crop(image: np.ndarray | EncodedImage, size: int) -> np.ndarray:
    """The largest square in the middle, resized: for evaluation, so it is decoded whole."""
    image = image.decoded() if isinstance(image, EncodedImage) else image
    height, width = image.shape[:2]
    side = min(height, width)
    return crop(image, _center(height, width, side, side), size)


def _center(height: int, width: int, h: int, w: int) -> Box:
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def random_box(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A box of `scale` of the area, of an aspect ratio in 3/4 .. 4/3, both drawn uniformly (the ratio in its log).

    Where ten draws do not fit, as in a long strip, the largest one of an allowed ratio in the middle.
    """
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return x, y, x + w, y + h
    h = min(height, max(1, round(width / RATIO[0])))
    w = min(width, max(1, round(height * RATIO[1])))
    return _center(height, width, h, w)


def augment(
    image: np.ndarray | EncodedImage,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] | None,
    flip: bool,
) -> np.ndarray:
    """A random resized crop and, half of the time, a mirror image.

    Args:
        image: [H, W, 3] uint8, or still encoded.
        size: pixels a side of the result.
        rng: where the randomness comes from.
        scale: smallest and largest share of the area that a crop keeps; None: no random crop, `center_crop`.
        flip: whether mirroring is allowed: not where captions speak of left and right.
    """
    out = crop(image, random_box(*image.shape[:2], scale, rng), size) if scale else center_crop(image, size)
    return out[:, ::-1] if flip and rng.random() < 0.5 else out
