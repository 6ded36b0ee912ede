"""pack: the batch that a model reads, and every way to ask for one wrongly."""

import numpy as np
import pytest
import torch

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.images import center_crop, keep_aspect
from m3ae_fast.downstream.pack import crop_box, pack, pack_for
from m3ae_fast.models import M3AE, M3AEConfig

TEXTS = ["a red circle", "two stars", "a ring"]
TOKENIZER = Tokenizer.train(TEXTS, 200)
SIZES = {"image_size": 16, "max_text_length": 8}


def noise(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


IMAGES = [noise(16, 16), noise(24, 40), noise(40, 24)]


def test_images_and_texts():
    batch = pack(IMAGES, TEXTS, TOKENIZER, **SIZES, sample_ids=[5, 6, 9])
    assert len(batch) == 3 and batch.has_image == (True,) * 3 and batch.sample_ids.tolist() == [5, 6, 9]
    assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous(memory_format=torch.channels_last)
    for image, packed in zip(IMAGES, batch.images, strict=True):
        assert np.array_equal(center_crop(image, 16), packed.permute(1, 2, 0).numpy())
    assert batch.text.dtype == torch.int32
    for text, ids in zip(TEXTS, batch.text.split(batch.text_lengths.lengths), strict=True):
        assert TOKENIZER.decode(ids.tolist()) == text


def test_images_of_mixed_sizes_are_whole():
    batch = pack(IMAGES, TEXTS, TOKENIZER, **SIZES, max_patches=16, patch_size=4)
    assert batch.grids == ((4, 4), (3, 5), (5, 3)) and batch.text_lengths.total
    for image, packed in zip(IMAGES, batch.whole_images(), strict=True):
        assert np.array_equal(keep_aspect(image, 4, 16), packed.permute(1, 2, 0).numpy())
    tall = M3AE(M3AEConfig.tiny(image_size=(64, 32), vocab_size=0, max_patches=16))
    assert pack_for(tall, IMAGES, None, None).grids == batch.grids


def test_images_alone():
    batch = pack(IMAGES[:2], None, None, **SIZES)
    assert batch.text_lengths.lengths == (0, 0) and batch.images.shape == (2, 3, 16, 16)
    assert batch.sample_ids.tolist() == [0, 1]


def test_texts_alone():
    batch = pack(None, TEXTS, TOKENIZER, **SIZES)
    assert batch.images is None and batch.has_image == (False,) * 3 and TOKENIZER.decode(batch.text.tolist()[-2:])


def test_long_texts_are_cut_and_counted():
    with pytest.warns(M3AEFastWarning, match="1 of 3 texts are longer than 2 words: the rest of them is cut off"):
        batch = pack(None, TEXTS, TOKENIZER, image_size=16, max_text_length=2)
    assert batch.text_lengths.lengths == (2, 2, 2)
    assert TOKENIZER.decode(batch.text[:2].tolist()) == "a red"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"images": None, "texts": None}, ValueError, "images and texts must not both be None"),
        ({"texts": TEXTS[:2]}, ValueError, "texts must be as many as the 3 images, got 2"),
        ({"images": [], "texts": None}, ValueError, "images must hold at least one, got none"),
        ({"images": None, "texts": []}, ValueError, "texts must hold at least one, got none"),
        ({"images": None, "texts": "a star"}, TypeError, "texts must be a list of strings, got one string"),
        ({"texts": ["a", " \t", "b"]}, ValueError, r"texts\[1\] must hold a word, got ' \\t'"),
        ({"texts": ["a", "b", None]}, TypeError, r"texts\[2\] must be a string, got NoneType"),
        ({"tokenizer": None}, TypeError, "tokenizer must be given with texts, got None"),
        ({"images": [*IMAGES[:2], None]}, TypeError, r"images\[2\] must be an array of uint8, got NoneType"),
        ({"images": [*IMAGES[:2], np.zeros((4, 4, 3))]}, TypeError, r"images\[2\] must .* uint8, got float64"),
        (
            {"images": [np.zeros((3, 4, 4), np.uint8), *IMAGES[:2]]},
            ValueError,
            r"images\[0\] must have shape \(height, width, 3\), got \(3, 4, 4\)",
        ),
        ({"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
        ({"max_text_length": 0}, ValueError, "max_text_length must be at least 1, got 0"),
        ({"sample_ids": [1]}, ValueError, r"sample_ids must have shape \(3,\), got \(1,\)"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pack(**({"images": IMAGES, "texts": TEXTS, "tokenizer": TOKENIZER} | SIZES | arguments))


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80), (80, 49)])
def test_crop_box_follows_the_picture(height, width):
    """A white box on black is where crop_box says it is, after the crop."""
    for x0, y0, x1, y1 in [(20, 18, 34, 30), (0, 0, 30, 26), (24, 20, width, height)]:
        image = np.zeros((height, width, 3), np.uint8)
        image[y0:y1, x0:x1] = 255
        cropped = center_crop(image, 32)[..., 0] > 127
        rows, columns = cropped.any(1).nonzero()[0], cropped.any(0).nonzero()[0]
        shown = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        np.testing.assert_allclose(crop_box((x0, y0, x1, y1), height, width, 32), shown, atol=1)


def test_crop_box_follows_the_picture_into_a_rectangle():
    image = np.zeros((60, 90, 3), np.uint8)
    image[20:40, 30:50] = 255
    cropped = center_crop(image, (16, 32))[..., 0] > 127
    rows, columns = cropped.any(1).nonzero()[0], cropped.any(0).nonzero()[0]
    shown = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    np.testing.assert_allclose(crop_box((30, 20, 50, 40), 60, 90, (16, 32)), shown, atol=1)


def test_any_channels_and_rectangles():
    images = [np.random.default_rng(i).integers(0, 256, (40, 50, 9), dtype=np.uint8) for i in range(2)]
    batch = pack(images, None, None, image_size=(16, 32), max_text_length=8, channels=9)
    assert batch.images.shape == (2, 9, 16, 32)
    with pytest.raises(ValueError, match=r"images\[0\] must have shape \(height, width, 3\), got \(40, 50, 9\)"):
        pack(images, None, None, image_size=16, max_text_length=8)


def test_a_box_that_is_cut_off():
    assert crop_box((0, 0, 20, 40), 40, 80, 32) is None and crop_box((60, 0, 80, 40), 40, 80, 32) is None
    assert crop_box((0, 0, 21, 40), 40, 80, 32) == pytest.approx((0, 0, 0.8, 32))
