"""What a file may ask of its reader: a hostile one claims gigabytes in a few bytes, or never ends."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

MAX_BYTES = 1 << 28  # of an encoded image, of a sample in a shard, of a row or a chunk of HDF5
MAX_TEXT = 1 << 24  # bytes of a caption file, of a row of JSON lines
MAX_SHARDS = 2_000_000  # that a pattern's braces name


def check_file(path: str | os.PathLike) -> None:
    """OSError: there is no such file, or it is a pipe or a device, whose reading may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is no regular file")


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A file, to be read. OSError: as `check_file`."""
    check_file(path)
    return open(path, "rb")


def check_size(size: int, most: int) -> None:
    """ValueError: there are more than `most` bytes."""
    if size > most:
        raise ValueError(f"it has more than {most:,} bytes")
