"""Crops: [H, W, 3] uint8 in, [size, size, 3] uint8 out, bicubic by Pillow."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
ATTEMPTS = 10


def _resize(crop: np.ndarray, size: int) -> np.ndarray:
    if crop.shape[:2] == (size, size):
        return crop
    return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))


def _center(image: np.ndarray, height: int, width: int) -> np.ndarray:
    y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[y : y + height, x : x + width]


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The largest square in the middle, resized: deterministic, for evaluation."""
    side = min(image.shape[:2])
    return _resize(_center(image, side, side), size)


def random_crop(image: np.ndarray, scale: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A view of `scale` of the area, of an aspect ratio in 3/4 .. 4/3, both drawn uniformly (the ratio in its log).

    Where ten draws do not fit, as in a long strip, the largest crop of an allowed ratio in the middle.
    """
    height, width = image.shape[:2]
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return image[y : y + h, x : x + w]
    h = min(height, max(1, round(width / RATIO[0])))
    w = min(width, max(1, round(height * RATIO[1])))
    return _center(image, h, w)


def augment(
    image: np.ndarray, size: int, rng: np.random.Generator, *, scale: tuple[float, float] | None, flip: bool
) -> np.ndarray:
    """A random resized crop and, half of the time, a mirror image.

    Args:
        image: [H, W, 3] uint8.
        size: pixels a side of the result.
        rng: where the randomness comes from.
        scale: smallest and largest share of the area that a crop keeps; None: no random crop, `center_crop`.
        flip: whether mirroring is allowed: not where captions speak of left and right.
    """
    out = center_crop(image, size) if scale is None else _resize(random_crop(image, scale, rng), size)
    return out[:, ::-1] if flip and rng.random() < 0.5 else out
