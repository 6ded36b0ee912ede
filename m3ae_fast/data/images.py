"""EncodedImage: a JPEG or PNG that is decoded once it is known which part is wanted, and at what size."""

from __future__ import annotations

import contextlib
import io
import os

import numpy as np
from PIL import Image

from m3ae_fast.data.bad_sample import BadSample

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


class EncodedImage:
    """An image still encoded, of which only the header is read.

    Args:
        source: the bytes of the file, or its path.
        name: what errors call it.
    Attributes:
        shape: (height, width, 3) of the upright image.
    Raises:
        BadSample: there is no such file, or no image in it.
    """

    def __init__(self, source: bytes | str | os.PathLike, name: str):
        self.name = name
        with _naming(name):
            self._image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
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


def resize(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """The part of an RGB image in `box` as [size, size, 3] uint8: bicubic, a pixel at the box's edge knows those
    outside."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def read_image(path: str | os.PathLike, name: str) -> np.ndarray:
    """An image file as [H, W, 3] uint8, upright, transparency on white.

    Raises:
        BadSample: it cannot be read or decoded.
    """
    return EncodedImage(path, name).decoded()


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
