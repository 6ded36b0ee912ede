"""EncodedImage: the part that is wanted, whatever was decoded to get it."""

import io

import numpy as np
import pytest
from PIL import Image

from m3ae_fast.data import BadSample, EncodedImage
from m3ae_fast.data.images import resize


def smooth(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards: what is where shows in the colours, at any scale."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * x / width, 255 * y / height, 0 * x], -1).astype(np.uint8))


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return file.getvalue()


@pytest.fixture
def drafts(monkeypatch):
    """The sizes that JPEGs were decoded at."""
    sizes, load = [], Image.Image.resize

    def resize(image, *arguments, **options):
        sizes.append(image.size)
        return load(image, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    return sizes


@pytest.mark.parametrize(
    "side, size, scale", [(800, 100, 4), (799, 100, 2), (399, 100, 1), (1000, 32, 8), (90, 100, 1), (150, 100, 1)]
)
def test_a_jpeg_is_decoded_no_larger_than_needed(drafts, side, size, scale):
    """At least twice the size wanted is left, and the part is the same to a third of a pixel."""
    image = smooth(1001, 1203)
    box = (101, 1, 101 + side, 1 + side)
    got = EncodedImage(encoded(image), "x.jpg").resized(box, size)
    assert drafts == [(-(-1203 // scale), -(-1001 // scale))]
    assert side / scale >= min(side, 2 * size)
    want = resize(image, box, size)
    pixel = 255 * side / size / 1203
    assert abs(got.astype(float) - want).mean() < max(1.5, pixel / 3)


def test_shape_is_known_without_decoding():
    data = encoded(smooth(60, 90))
    assert EncodedImage(data, "x.jpg").shape == (60, 90, 3)
    header = EncodedImage(data[:-500], "x.jpg")
    assert header.shape == (60, 90, 3)
    with pytest.raises(BadSample, match=r"x\.jpg: .*truncated") as error:
        header.resized((0, 0, 40, 40), 20)
    assert error.value.kind == "image"
    with pytest.raises(BadSample, match=r"x\.jpg"):
        EncodedImage(data[:-500], "x.jpg").decoded()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_turned_photo_is_cut_upright(orientation):
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = smooth(600, 900)
    got = EncodedImage(encoded(upright.transpose(turned), exif=exif), "x.jpg")
    assert got.shape == (600, 900, 3)
    box = (500, 20, 800, 320)
    np.testing.assert_allclose(got.resized(box, 30), resize(upright, box, 30).astype(int), atol=6)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_a_turn_that_there_is_not_is_none(drafts, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    EncodedImage(encoded(smooth(600, 900), exif=exif), "x.jpg").resized((0, 0, 600, 600), 30)
    assert drafts == [(113, 75)], "decoded at an eighth"


def test_an_odd_tag_does_not_keep_a_photo_from_being_turned(monkeypatch):
    """Of the EXIF data nothing is written again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(smooth(60, 90), exif=exif)

    def fail(self, offset=8):
        raise ValueError("cannot write this tag")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert EncodedImage(data, "x.jpg").shape == (90, 60, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_a_part_is_the_part_of_the_whole(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    if mode == "I;16":
        image = Image.fromarray(np.asarray(smooth(50, 70).convert("L")).astype(np.uint16) * 257)
    else:
        image = smooth(50, 70).convert(mode)
    data = encoded(image, kind)
    whole = EncodedImage(data, "x").decoded()
    assert whole.shape == (50, 70, 3)
    assert np.array_equal(EncodedImage(data, "x").resized((10, 20, 30, 40), 20), whole[20:40, 10:30])
