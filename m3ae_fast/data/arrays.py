"""EncodedArray: the pixels of an image of any channels, in a file of NumPy's."""

from __future__ import annotations

import io
import math
import os
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.limits import MAX_BYTES, check_size, open_file

SUFFIX = "npy"
MAGIC = b"\x93NUMPY"  # how such a file begins
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}  # by version; 3.0 is of named fields


class EncodedArray:
    """A .npy file of [C, H, W], [H, W, C] or [H, W] uint8, of which only the header is read.

    It is read as what it is, without pickle: a header, which says dtype and shape, and the bytes of the pixels.

    Args:
        source: the bytes of the file, or its path.
        name: what errors call it.
        channels: C. An axis of so many entries holds them, the last one where there are two.
        most: pixels that an image may have; None: any number.
    Attributes:
        shape: (height, width, C).
    Raises:
        BadSample: there is no such file, it is damaged, of another dtype, has no axis of C entries (its kind is then
            "channels"), too many pixels, or more than 256 MiB.
    """

    def __init__(self, source: bytes | str | os.PathLike, name: str, channels: int, most: int | None = None):
        self.name, self._source = name, source
        try:
            with self._opened() as file:
                self._stored, self._order, self._begin = _header(file)
                left = file.seek(0, os.SEEK_END) - self._begin
            self._first = channels_first(name, self._stored, channels)
            height, width = self._stored[1:] if self._first else self._stored[:2]
            if not height or not width:
                raise ValueError(f"it must have pixels, got {height} x {width}")
            if most is not None and height * width > most:
                raise ValueError(f"it has {height * width:,} pixels, at most {most:,} are read")
            check_size(math.prod(self._stored), MAX_BYTES)
            if left != math.prod(self._stored):
                raise ValueError(f"it must have {math.prod(self._stored):,} bytes of pixels, got {left:,}")
        except (MemoryError, BadSample):
            raise
        except Exception as error:  # of a forged header, NumPy raises ValueError, SyntaxError, TokenError ...
            raise BadSample(name, str(error) or type(error).__name__, "image") from error
        self.shape = (height, width, channels)

    def decoded(self) -> np.ndarray:
        """The whole image, [H, W, C] uint8. BadSample: it has changed since its header was read."""
        count = math.prod(self._stored)
        try:
            with self._opened() as file:
                file.seek(self._begin)
                data = file.read(count)
            array = np.frombuffer(data, np.uint8).reshape(self._stored, order=self._order)
        except (OSError, ValueError) as error:
            raise BadSample(self.name, str(error), "image") from error
        return as_pixels(array, self._first)

    def _opened(self) -> BinaryIO:
        return io.BytesIO(self._source) if isinstance(self._source, bytes) else open_file(self._source)


def channels_first(name: str, shape: tuple[int, ...], channels: int) -> bool:
    """Whether the channels are the first axis of an image's, not the last; [H, W] are one.

    Raises:
        BadSample: neither is of so many, and `name` is what its message calls the image.
    """
    shape = (*shape, 1) if len(shape) == 2 else shape
    if len(shape) != 3 or channels not in (shape[0], shape[2]):
        raise BadSample(name, f"it has shape {shape}, and no axis of {channels} channels", "channels")
    return shape[2] != channels


def as_pixels(array: np.ndarray, first: bool) -> np.ndarray:
    """[C, H, W] where the channels come `first`, [H, W, C] or [H, W] as [H, W, C]; a view."""
    return np.moveaxis(array, 0, -1) if first else array.reshape(*array.shape[:2], -1)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], str, int]:
    """(shape, order of NumPy's reshape, where the pixels begin). ValueError: it is no array of uint8."""
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"it must be of version 1.0 or 2.0 of NumPy's format, got {version[0]}.{version[1]}")
    shape, fortran, dtype = HEADERS[version](file)
    if dtype != np.uint8:
        raise ValueError(f"its pixels must be uint8, got {dtype}: scale them to 0 .. 255 first")
    return shape, "F" if fortran else "C", file.tell()
