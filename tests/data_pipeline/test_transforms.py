"""Crops: where they are taken, and what comes out."""

import numpy as np
import pytest

from m3ae_fast.data.seeds import SAMPLE, generator
from m3ae_fast.data.transforms import augment, center_crop, crop, random_box


def gradient(height: int, width: int) -> np.ndarray:
    """Red is the row, green the column: a crop shows where it is from."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None]
    image[..., 1] = np.arange(width)
    return image


@pytest.mark.parametrize("height, width", [(40, 40), (40, 61), (77, 40)])
def test_center_crop(height, width):
    image = gradient(height, width)
    out = center_crop(image, 40)
    top, left = (height - 40) // 2, (width - 40) // 2
    assert np.array_equal(out, image[top : top + 40, left : left + 40])


@pytest.mark.parametrize("size", [1, 7, 32, 100])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (200, 3), (33, 64)])
def test_any_size(size, height, width):
    image = gradient(height, width)
    assert center_crop(image, size).shape == (size, size, 3)
    for i in range(5):
        out = augment(image, size, generator(0, SAMPLE, 0, i), scale=(0.2, 1.0), flip=True)
        assert out.shape == (size, size, 3) and out.dtype == np.uint8


def test_resizing_keeps_values():
    image = np.full((50, 70, 3), 137, np.uint8)
    assert (center_crop(image, 32) == 137).all()
    assert (augment(image, 96, generator(0, SAMPLE), scale=(0.2, 1.0), flip=True) == 137).all()
    out = center_crop(gradient(200, 200), 20)
    np.testing.assert_allclose(out[1:-1, :, 0], np.arange(20)[1:-1, None].repeat(20, 1) * 10 + 4.5, atol=1)


def test_random_crops_cover_the_range():
    boxes = np.array([random_box(240, 240, (0.2, 1.0), generator(0, SAMPLE, 0, i)) for i in range(800)])
    corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(1) / 240**2
    ratios = sides[:, 0] / sides[:, 1]
    assert 0.19 < areas.min() < 0.23 and 0.93 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.77 and 1.3 < ratios.max() < 1.35
    assert corners.min() == 0 and corners.max() > 100 and boxes.max() == 240


def test_the_box_is_what_comes_out():
    image, (x0, y0, x1, y1) = gradient(90, 120), (30, 20, 70, 60)
    assert np.array_equal(crop(image, (x0, y0, x1, y1), 40), image[y0:y1, x0:x1])
    halved = crop(image, (x0, y0, x1, y1), 20)
    np.testing.assert_allclose(halved[..., 0], np.arange(20)[:, None].repeat(20, 1) * 2 + y0 + 0.5, atol=1)
    np.testing.assert_allclose(halved[..., 1], np.arange(20)[None].repeat(20, 0) * 2 + x0 + 0.5, atol=1)


def test_a_strip_falls_back_to_its_middle():
    assert random_box(10, 250, (0.9, 1.0), generator(0, SAMPLE)) == (118, 0, 131, 10)
    assert random_box(250, 9, (0.9, 1.0), generator(0, SAMPLE)) == (0, 119, 9, 131)


def test_mirroring():
    image = gradient(32, 32)
    outs = [augment(image, 32, generator(0, SAMPLE, 0, i), scale=None, flip=True) for i in range(200)]
    mirrored = [np.array_equal(out, image[:, ::-1]) for out in outs]
    assert all(m or np.array_equal(out, image) for m, out in zip(mirrored, outs, strict=True))
    assert 60 < sum(mirrored) < 140
    for i in range(50):
        assert np.array_equal(augment(image, 32, generator(0, SAMPLE, 0, i), scale=None, flip=False), image)


def test_keys_never_meet():
    """Seed, stream, epoch and index each change the draw, at any size."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**63 - 1, 2, 2**40, 2**56)]
    draws = [tuple(generator(*key).integers(2**62, size=2)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(generator(*key).integers(2**62, size=2)) for key in keys]
    neighbours = [generator(0, SAMPLE, 0, i).integers(2**62, size=64) for i in range(8)]
    assert len(np.unique(neighbours)) == 8 * 64, "nor does one item's stream run on into the next one's"
