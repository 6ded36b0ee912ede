"""An image's way from a file to the pixels of a batch, in this order.

    open_image                  a file of which the header is read: how large the upright image is
    random_box, center_box      the part that is wanted
    crop                        that part, decoded and resized to [height, width, channels] uint8
    augment, center_crop        what training and evaluation take of an image
    stack                       those of a batch: ImageTextBatch.images
    keep_aspect, tensors        instead of these two, for images of mixed sizes: ImageTextBatch.from_images

The model's `gather_patches` then reads the patches that are kept, and normalizes them on the way.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.data.arrays import MAGIC, EncodedArray
from m3ae_fast.data.arrays import SUFFIX as ARRAYS
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.limits import MAX_BYTES, check_file, check_size

FORMATS = {  # by their names in Pillow, with the suffixes of their files: a file may not choose any other decoder
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
}
OTHERS = (  # suffixes of images that are not read: what is beside such a one must not be trained on alone
    "avif", "heic", "heif", "jxl", "jp2", "j2k", "svg", "eps", "psd", "ico", "icns", "pbm", "pgm", "ppm", "tga", "dds",
    "exr", "hdr", "dng", "cr2", "cr3", "nef", "arw", "orf", "raw", "dcm",
)  # fmt: skip
IMAGES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_PIXELS = "M3AE_FAST_MAX_PIXELS"  # an environment variable, so that it reaches every command and every worker
RAISED = f"({MAX_PIXELS} or PIL.Image.MAX_IMAGE_PIXELS raises the limit)"
if MAX_PIXELS in os.environ:
    if not os.environ[MAX_PIXELS].isdecimal():
        raise ValueError(f"{MAX_PIXELS} must be a number of pixels, got {os.environ[MAX_PIXELS]!r}")
    Image.MAX_IMAGE_PIXELS = int(os.environ[MAX_PIXELS])
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 just outside
Size = int | tuple[int, int]  # pixels a side, or (height, width)
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # what makes the image upright, by the tag; where it is anything else, as it is stored
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
GRAY = ("L", "I;16", "I;16B", "I;16L", "I;16N")  # modes of a page that is one channel of several
JPEG_SCALES = (8, 4, 2)  # a JPEG can be decoded at 1/8, 1/4 or 1/2 of its size, for little more than that share of work
REDUCING_GAP = 2.0  # what is decoded so keeps at least so many times the size wanted
RATIO = (3 / 4, 4 / 3)  # width / height of a random crop
ATTEMPTS = 10


def suffix_of(name: str) -> str:
    """What is behind the last dot of a file's name, in lower case: one of IMAGES, of OTHERS or any other."""
    return name.rpartition(".")[2].lower()


def not_read(suffix: str) -> str:
    """Why an image of OTHERS is not read."""
    return f".{suffix} is no image that is read, those are {', '.join(FORMATS)}"


def open_image(source: bytes | str | os.PathLike, name: str, channels: int = 3) -> EncodedImage | EncodedArray:
    """An image still encoded, of which only the header is read: of FORMATS, or an array of NumPy's.

    Args:
        source: the bytes of the file, or its path. name: what errors call it. channels: that are wanted.
    Raises:
        BadSample: as EncodedImage and EncodedArray.
    """
    if source.startswith(MAGIC) if isinstance(source, bytes) else suffix_of(os.fspath(source)) == ARRAYS:
        return EncodedArray(source, name, channels, Image.MAX_IMAGE_PIXELS)
    return EncodedImage(source, name, channels)


class EncodedImage:
    """An image that is still encoded; only its header is read. Of an animation or of several pages it is the first,
    unless the pages are its channels.

    Args:
        source: the bytes of the file, or its path.
        name: what errors call it.
        channels: 3: RGB, transparency on white. 1: the same in gray. 4: RGBA, opaque where there is no transparency.
            2 to 16 but for 3: the pages of a TIFF, each gray and of one size, a channel each.
    Attributes:
        shape: (height, width, channels) of the upright image.
    Raises:
        BadSample: there is no such file, no image of FORMATS in it, one of 32-bit pixels, whose scale nobody knows, of
            more pixels than PIL.Image.MAX_IMAGE_PIXELS, which M3AE_FAST_MAX_PIXELS sets, or of other channels (its kind
            is then "channels").
    """

    def __init__(self, source: bytes | str | os.PathLike, name: str, channels: int = 3):
        self.name, self._channels = name, channels
        with _naming(name):
            self._image = _opened(source)
            self._pages = channels not in (1, 3) and _are_pages(self._image, channels)
            if not self._pages and channels not in MODES:
                bands = len(self._image.getbands())
                self._image.close()
                raise BadSample(name, f"it has {bands} channels, {channels} are wanted", "channels")
            turn = TURNS.get(self._image.getexif().get(ORIENTATION))
            if turn is not None and not self._pages:  # photos: turned before anything is cut out of them
                with self._image as stored:
                    self._image = stored.transpose(turn)
            width, height = self._image.size
        self.shape = (height, width, channels)

    def decoded(self) -> np.ndarray:
        """The whole image, [H, W, channels] uint8, upright. BadSample: it cannot be decoded."""
        with _naming(self.name), self._image as image:
            return _joined([np.asarray(part) for part in self._parts(image)])

    def resized(self, box: Box, size: Size) -> np.ndarray:
        """The pixels in `box`, resized to [height, width, channels] uint8: bicubic.

        Of a large JPEG no more is decoded than REDUCING_GAP asks for, so this or `decoded` can be called, once.

        Raises:
            BadSample: they cannot be decoded.
        """
        high, wide = _checks.sides("size", size)
        with _naming(self.name), self._image as image:
            width, height = image.size
            room = min((box[2] - box[0]) / wide, (box[3] - box[1]) / high) / REDUCING_GAP
            scale = next((scale for scale in JPEG_SCALES if scale <= room), 1)
            if scale > 1 and image.draft(None, (width // scale, height // scale)):  # None where it is no JPEG
                box = tuple(side / scale for side in box)
            return _joined([resize(part, box, size) for part in self._parts(image)])

    def _parts(self, image: Image.Image) -> list[Image.Image]:
        """One of RGB, or one of "L" for each channel."""
        if not self._pages:
            return _in_parts(image, self._channels)
        parts = []
        for page in range(self._channels):
            image.seek(page)
            parts.append(_eight_bits(image.copy()))
        return parts


def _opened(source: bytes | str | os.PathLike) -> Image.Image:
    if not isinstance(source, bytes):
        check_file(source)
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=tuple(FORMATS))
    except UnidentifiedImageError:  # its message has the address of a buffer
        raise ValueError(f"cannot identify it as one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:  # at twice the limit; up to there Pillow warns
        raise ValueError(f"{error} {RAISED}") from None
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    reason = ""
    if most is not None and pixels > most:
        reason = f"it has {pixels:,} pixels, at most {most:,} are read {RAISED}"
    elif image.format == "TIFF" and image.mode in ("I", "F"):
        reason = "its pixels have 32 bits, 8 or 16 are read"
    if reason:
        image.close()
        raise ValueError(reason)
    return image


@contextlib.contextmanager
def _naming(name: str):
    """Whatever a decoder raises becomes a BadSample."""
    try:
        yield
    except (MemoryError, BadSample):
        raise
    except Exception as error:  # of a damaged file, decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise BadSample(name, str(error) or type(error).__name__, "image") from error


def _are_pages(image: Image.Image, channels: int) -> bool:
    """Whether it is a TIFF of so many pages, each gray and of the first one's size. ValueError: they are too large."""
    if image.format != "TIFF":
        return False
    size = image.size

    def has(page: int) -> bool:
        try:
            image.seek(page)
        except EOFError:
            return False
        return True

    fit = all(has(page) and image.mode in GRAY and image.size == size for page in range(channels)) and not has(channels)
    image.seek(0)
    if fit:
        check_size(channels * size[0] * size[1], MAX_BYTES)
    return fit


def _in_parts(image: Image.Image, channels: int) -> list[Image.Image]:
    """One of RGB, or one of "L" for each channel: bicubic weights do not mix them, nor is a fourth one an alpha."""
    if channels == 3:
        return [_rgb(image)]
    if channels == 4 and image.has_transparency_data:
        return list(_eight_bits(image).convert("RGBA").split())
    return list(_rgb(image).convert(MODES[channels]).split())


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """[H, W, 3], or several of [H, W] as [H, W, channels]."""
    return parts[0] if parts[0].ndim == 3 else np.dstack(parts)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's conversion clips, so that all but the darkest is white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:  # most are: no copy
        return image
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def random_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator, aspect: float = 1.0
) -> Box:
    """A box of `scale` of the area, of `aspect` (width / height) times 3/4 .. 4/3, both drawn uniformly (the latter in
    its log).

    Where ten draws do not fit, as in a long strip, the largest one of an allowed ratio in the middle.
    """
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = aspect * math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return x, y, x + w, y + h
    h = min(height, max(1, round(width / (aspect * RATIO[0]))))
    w = min(width, max(1, round(height * (aspect * RATIO[1]))))
    return _center(height, width, h, w)


def center_box(height: int, width: int, aspect: float = 1.0) -> Box:
    """The largest box of an aspect (width / height) in the middle: by default the square."""
    h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
    return _center(height, width, h, w)


def aspect_of(size: Size) -> float:
    """Width / height."""
    height, width = _checks.sides("size", size)
    return width / height


def _center(height: int, width: int, h: int, w: int) -> Box:
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def crop(image: np.ndarray | EncodedImage | EncodedArray, box: Box, size: Size) -> np.ndarray:
    """What is in the box, resized to [height, width, C] uint8; of a decoded image that needs no resizing, a view.

    Args:
        image: [H, W, C] uint8, or still encoded.
        box: x0, y0, x1, y1 in pixels. size: pixels a side of the result, or (height, width).
    """
    if isinstance(image, EncodedImage):
        return image.resized(box, size)
    image = image.decoded() if isinstance(image, EncodedArray) else image
    x0, y0, x1, y1 = box
    if (y1 - y0, x1 - x0) == _checks.sides("size", size):
        return image[y0:y1, x0:x1]
    parts = [image] if image.shape[2] == 3 else np.moveaxis(image, -1, 0)
    return _joined([resize(Image.fromarray(part), box, size) for part in parts])


def resize(image: Image.Image, box: tuple[float, float, float, float], size: Size) -> np.ndarray:
    """The part of an RGB image in `box` as [height, width, 3] uint8, or of one of mode "L" as [height, width]: bicubic,
    a pixel at the box's edge knows those outside."""
    height, width = _checks.sides("size", size)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def augment(
    image: np.ndarray | EncodedImage | EncodedArray,
    size: Size,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] | None,
    flip: bool,
) -> np.ndarray:
    """A random resized crop and, half of the time, a mirror image.

    Args:
        image: [H, W, C] uint8, or still encoded.
        size: pixels a side of the result, or (height, width).
        rng: where the randomness comes from.
        scale: smallest and largest share of the area that a crop keeps; None: no random crop, `center_crop`.
        flip: whether mirroring is allowed: not where captions speak of left and right.
    """
    if scale:
        out = crop(image, random_box(*image.shape[:2], scale, rng, aspect_of(size)), size)
    else:
        out = center_crop(image, size)
    return out[:, ::-1] if flip and rng.random() < 0.5 else out


def center_crop(image: np.ndarray | EncodedImage | EncodedArray, size: Size) -> np.ndarray:
    """The box of `center_box` of the size's aspect, resized to it: for evaluation, so the image is decoded whole."""
    image = image if isinstance(image, np.ndarray) else image.decoded()
    return crop(image, center_box(*image.shape[:2], aspect_of(size)), size)


def keep_aspect(
    image: np.ndarray | EncodedImage | EncodedArray,
    patch_size: int,
    max_patches: int,
    *,
    mirror: np.random.Generator | None = None,
) -> np.ndarray:
    """The whole image, resized to the [height, width, C] uint8 of `native_grid`.

    Args:
        image: [H, W, C] uint8, or still encoded.
        patch_size: pixels a side of a patch. max_patches: at least 1.
        mirror: draws whether it is mirrored, half of the time; None: it is not.
    """
    height, width = image.shape[:2]
    size = tuple(side * patch_size for side in native_grid(height, width, max_patches))
    out = crop(image, (0, 0, width, height), size)
    return out[:, ::-1] if mirror is not None and mirror.random() < 0.5 else out


def native_grid(height: int, width: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches: those of the largest image of this aspect, rounded up to whole patches, that has no
    more than max_patches.

    Source: as SigLIP 2 (arXiv:2502.14786, section 2.4.2) and timm's NaFlex have it, which search for the scale.
    """
    rows, columns = _most_along(height, width, max_patches), _most_along(width, height, max_patches)
    if rows * width >= columns * height:  # the scale, patches for a pixel, is that of the side which allows more
        return rows, -(-rows * width // height)
    return -(-columns * height // width), columns


def _most_along(side: int, other: int, max_patches: int) -> int:
    """The most patches along a side, where the other one has as many as the aspect says, rounded up."""
    count = math.isqrt(max_patches * side // other)
    while count * -(-count * other // side) > max_patches:
        count -= 1
    return count


def tensors(images: Sequence[np.ndarray]) -> list[Tensor]:
    """Images of any sizes, [H, W, C] uint8 each, as [C, H, W] in channels-last memory."""
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """Images of one size, [H, W, C] uint8 each, as [N, C, H, W] in channels-last memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
