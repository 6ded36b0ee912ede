"""An image's way from a file to the pixels of a batch, in this order.

    EncodedImage                a file of which the header is read: how large the upright image is
    random_box, center_box      the part that is wanted
    crop                        that part, decoded and resized to [size, size, 3] uint8
    augment, center_crop        what training and evaluation take of an image
    stack                       those of a batch: ImageTextBatch.images

The model's `gather_patches` then reads the patches that are kept, and normalises them on the way.
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

from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.limits import check_file

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


class EncodedImage:
    """An image still encoded, of which only the header is read. Of an animation or several pages it is the first one.

    Args:
        source: the bytes of the file, or its path.
        name: what errors call it.
    Attributes:
        shape: (height, width, 3) of the upright image.
    Raises:
        BadSample: there is no such file, no image of FORMATS in it, one of 32-bit pixels, whose scale nobody knows, or
            of more pixels than PIL.Image.MAX_IMAGE_PIXELS, which M3AE_FAST_MAX_PIXELS sets.
    """

    def __init__(self, source: bytes | str | os.PathLike, name: str):
        self.name = name
        with _naming(name):
            self._image = _opened(source)
            turn = TURNS.get(self._image.getexif().get(ORIENTATION))
            if turn is not None:  # as cameras store photos: turned before anything is cut out of them
                with self._image as stored:
                    self._image = stored.transpose(turn)
            width, height = self._image.size
        self.shape = (height, width, 3)

    def decoded(self) -> np.ndarray:
        """The whole image, [H, W, 3] uint8, upright, transparency on white. BadSample: it cannot be decoded."""
        with _naming(self.name), self._image as image:
            return np.asarray(_rgb(image))

    def resized(self, box: Box, size: int) -> np.ndarray:
        """The pixels in `box`, resized to [size, size, 3] uint8: bicubic. BadSample: they cannot be decoded.

        Of a large JPEG no more is decoded than REDUCING_GAP asks for, so this or `decoded` can be called, once.
        """
        with _naming(self.name), self._image as image:
            width, height = image.size
            room = min(box[2] - box[0], box[3] - box[1]) / (REDUCING_GAP * size)
            scale = next((scale for scale in JPEG_SCALES if scale <= room), 1)
            if scale > 1 and image.draft(None, (width // scale, height // scale)):  # None where it is no JPEG
                box = tuple(side / scale for side in box)
            return resize(_rgb(image), box, size)


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
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise BadSample(name, str(error) or type(error).__name__, "image") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:  # most are: no copy
        return image
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's conversion clips, so that all but the darkest is white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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


def center_box(height: int, width: int) -> Box:
    """The largest square in the middle."""
    side = min(height, width)
    return _center(height, width, side, side)


def _center(height: int, width: int, h: int, w: int) -> Box:
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


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


def resize(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """The part of an RGB image in `box` as [size, size, 3] uint8: bicubic, a pixel at the box's edge knows those
    outside."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


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


def center_crop(image: np.ndarray | EncodedImage, size: int) -> np.ndarray:
    """The square of `center_box`, resized to [size, size, 3] uint8: for evaluation, so the image is decoded whole."""
    image = image.decoded() if isinstance(image, EncodedImage) else image
    return crop(image, center_box(*image.shape[:2]), size)


def stack(images: Sequence[np.ndarray]) -> Tensor:
    """Images of one size, [H, W, 3] uint8 each, as [N, 3, H, W] in channels-last memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
