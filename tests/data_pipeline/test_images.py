"""An image's way: the part that is wanted, whatever was decoded to get it; where crops are taken, what comes out."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import m3ae_fast
from m3ae_fast.data import BadSample, EncodedImage
from m3ae_fast.data.images import FORMATS, augment, center_crop, crop, keep_aspect, native_grid, random_box, resize
from m3ae_fast.data.seeds import SAMPLE, generator


def smooth(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards: what is where shows in the colors, at any scale."""
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


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind):
    """Each is read, by its contents; of an animation or several pages the first."""
    image = smooth(40, 60)
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind in ("WEBP", "GIF", "TIFF", "PNG"):
        options |= {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]}
    got = EncodedImage(encoded(image, kind, **options), "x.png").decoded()
    tolerance = {"JPEG": 6, "GIF": 20}.get(kind, 0)  # 256 colors
    np.testing.assert_allclose(got.astype(int), np.asarray(image, int), atol=tolerance)


def test_two_pictures_in_one_jpeg():
    """As phones store a photo and its depth: the first one."""
    image = smooth(40, 60)
    got = EncodedImage(encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)]), "x.jpg").decoded()
    np.testing.assert_allclose(got.astype(int), np.asarray(image, int), atol=8)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO", "TGA", "JPEG2000", "SGI", "PCX", "IM", "DDS", "ICNS"])
def test_no_other_decoder_is_started(tmp_path, monkeypatch, kind):
    """EPS, called .jpg, would start Ghostscript; the others are so much more code that a file could choose."""
    try:
        data = encoded(smooth(64, 64), kind)
    except OSError:
        pytest.skip(f"Pillow was built without {kind}")
    Image.init()
    for name in {kind, "EPS"} & Image.OPEN.keys():
        monkeypatch.setitem(Image.OPEN, name, (pytest.fail, None))
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(BadSample, match=r"x\.jpg: cannot identify it as one of JPEG, PNG, WEBP") as error:
            EncodedImage(source, "x.jpg")
        assert error.value.kind == "image"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_an_unknown_scale_are_refused(mode):
    data = encoded(Image.fromarray(np.ones((4, 4), {"F": np.float32, "I": np.int32}[mode])), "TIFF")
    with pytest.raises(BadSample, match=r"x\.tif: its pixels have 32 bits, 8 or 16 are read"):
        EncodedImage(data, "x.tif")


def test_images_are_opened_in_one_place():
    """A second Image.open would need the list of formats, too."""
    found = [p for p in Path(m3ae_fast.__file__).parent.rglob("*.py") if "Image.open(" in p.read_text(encoding="utf-8")]
    assert [path.name for path in found] == ["images.py"]


def test_a_photo_becomes_gray_or_gains_an_opaque_channel():
    photo = smooth(60, 90)
    data = encoded(photo)
    rgb = EncodedImage(data, "x").decoded()
    gray = EncodedImage(data, "x", 1)
    assert gray.shape == (60, 90, 1)
    assert np.array_equal(gray.decoded()[..., 0], np.asarray(Image.fromarray(rgb).convert("L")))
    assert np.array_equal(EncodedImage(data, "x", 4).decoded(), np.dstack([rgb, np.full((60, 90), 255, np.uint8)]))


def test_transparency_is_a_channel_where_four_are_wanted():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG")
    assert np.array_equal(EncodedImage(data, "x", 4).decoded(), pixels)
    assert EncodedImage(data, "x").decoded().shape == (8, 9, 3)


@pytest.mark.parametrize("channels", [2, 4, 9])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_pages_of_a_tiff_are_channels(channels, dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (channels, 20, 30), dtype=dtype)
    first, *rest = map(Image.fromarray, pixels)
    data = encoded(first, "TIFF", save_all=True, append_images=rest)
    wanted = np.moveaxis(pixels >> (0 if dtype == np.uint8 else 8), 0, -1)
    assert np.array_equal(EncodedImage(data, "x", channels).decoded(), wanted)
    cut = EncodedImage(data, "x", channels).resized((5, 2, 25, 18), (8, 10))
    for channel in range(channels):
        part = Image.fromarray(np.ascontiguousarray(wanted[..., channel].astype(np.uint8)))
        assert np.array_equal(cut[..., channel], resize(part, (5, 2, 25, 18), (8, 10)))
    for other in {channels - 1, channels + 1} - {1, 3, 4}:
        with pytest.raises(BadSample, match=f"it has 1 channels, {other} are wanted"):
            EncodedImage(data, "x", other)
    assert EncodedImage(data, "x").decoded().shape == (20, 30, 3), "of a model of three channels the first page is read"


def test_pages_that_differ_are_no_channels():
    pages = [Image.new("L", size) for size in ((30, 20), (30, 20), (20, 30))]
    with pytest.raises(BadSample, match="it has 1 channels, 5 are wanted"):
        EncodedImage(encoded(pages[0], "TIFF", save_all=True, append_images=[*pages[1:], *pages[:2]]), "x", 5)
    with pytest.raises(BadSample, match="it has 3 channels, 5 are wanted") as caught:
        EncodedImage(encoded(smooth(20, 30)), "x", 5)
    assert caught.value.kind == "channels"


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_a_crop_may_be_a_rectangle_of_any_channels(channels):
    image = np.random.default_rng(0).integers(0, 256, (60, 90, channels), dtype=np.uint8)
    whole = center_crop(image, (20, 40))
    assert whole.shape == (20, 40, channels)
    for channel in range(channels):  # 90 x 45 of the aspect, in the middle
        part = Image.fromarray(np.ascontiguousarray(image[..., channel]))
        assert np.array_equal(whole[..., channel], resize(part, (0, 7, 90, 52), (20, 40)))
    rng = np.random.default_rng(1)
    assert augment(image, (20, 40), rng, scale=(0.2, 1.0), flip=True).shape == (20, 40, channels)
    tall = EncodedImage(encoded(smooth(600, 900)), "x").resized((0, 0, 200, 600), (60, 20))
    assert tall.shape == (60, 20, 3)


@pytest.mark.parametrize("aspect", [0.5, 2.0])
def test_random_boxes_have_the_aspect_of_what_is_wanted(aspect):
    """Then pixels are stretched by 4/3 at most, as those of squares are."""
    rng = np.random.default_rng(0)
    boxes = [random_box(500, 500, (0.1, 0.3), rng, aspect) for _ in range(300)]
    ratios = np.array([(x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in boxes]) / aspect
    assert 0.74 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.35


def test_pages_that_lead_back_have_an_end():
    page = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30).astype(np.uint8))
    data = bytearray(encoded(page, "TIFF", save_all=True, append_images=[page]))
    first = int.from_bytes(data[4:8], "little")

    def next_of(directory):  # where it says which directory comes next
        return directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], "little")

    second = int.from_bytes(data[next_of(first) : next_of(first) + 4], "little")
    assert EncodedImage(bytes(data), "x", 2).decoded().shape == (20, 30, 2)
    data[next_of(second) : next_of(second) + 4] = first.to_bytes(4, "little")
    assert EncodedImage(bytes(data), "x", 2).decoded().shape == (20, 30, 2)
    with pytest.raises(BadSample, match="it has 1 channels, 9 are wanted"):
        EncodedImage(bytes(data), "x", 9)


def test_a_part_may_be_resized_to_another_aspect():
    image = smooth(300, 400)
    for source in (np.asarray(image), EncodedImage(encoded(image, "PNG"), "x.png")):
        got = crop(source, (0, 0, 400, 300), (24, 48))
        assert got.shape == (24, 48, 3)
        np.testing.assert_array_equal(got, resize(image, (0, 0, 400, 300), (24, 48)))


@pytest.mark.parametrize("max_patches", [1, 7, 64, 256, 1000])
def test_the_native_grid_is_the_largest_that_fits(max_patches):
    """Against SigLIP 2's search: the scale is bisected, each side rounded up to whole patches."""
    rng = np.random.default_rng(max_patches)
    for height, width in [
        (480, 640),
        (640, 480),
        (256, 256),
        (1, 900),
        (900, 1),
        *rng.integers(1, 3000, (100, 2)).tolist(),
    ]:
        low, high = 1e-6, 100.0 * max_patches
        for _ in range(100):
            scale = (low + high) / 2
            fits = max(math.ceil(height * scale), 1) * max(math.ceil(width * scale), 1) <= max_patches
            low, high = (scale, high) if fits else (low, scale)
        assert native_grid(height, width, max_patches) == (math.ceil(height * low), math.ceil(width * low))


def test_an_image_that_keeps_its_aspect_is_whole():
    image = smooth(300, 600)
    for source in (np.asarray(image), EncodedImage(encoded(image, "PNG"), "x.png")):
        np.testing.assert_array_equal(keep_aspect(source, 8, 32), resize(image, (0, 0, 600, 300), (32, 64)))
    got = [keep_aspect(np.asarray(image), 8, 32, mirror=np.random.default_rng(seed)) for seed in range(8)]
    mirrored = [bool(each[:, 0, 0].mean() > each[:, -1, 0].mean()) for each in got]
    assert set(mirrored) == {False, True}
    for each, is_mirrored in zip(got, mirrored, strict=True):
        np.testing.assert_array_equal(each[:, ::-1] if is_mirrored else each, got[mirrored.index(False)])
