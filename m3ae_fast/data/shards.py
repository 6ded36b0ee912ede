"""TarDataset: WebDataset shards on a local disk, read in any order."""

from __future__ import annotations

import functools
import glob
import io
import math
import os
import re
import tarfile
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.images import IMAGES, OTHERS, not_read, open_image, suffix_of
from m3ae_fast.data.limits import MAX_BYTES, MAX_SHARDS, check_size, open_file
from m3ae_fast.data.rows import parse_object
from m3ae_fast.data.sample import EncodedDataset, Sample, caption_lines, check_classes, clean_captions

SUFFIXES = {*IMAGES, *OTHERS, "txt", "json", "cls"}
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
BLOCK = 512  # of a tar file: headers and contents begin at its multiples


class TarDataset(EncodedDataset):
    """`.tar` files in which the files of a sample follow one another: `key.jpg` (or another of `images.IMAGES`),
    `key.txt` (captions, one a line), `key.json` (its "caption", a string or a list), `key.cls` (a class's number). A
    key ends at its first dot: of `a.b.jpg` it is `a`, and no image. A key whose second image (or text ...) comes begins
    another sample. With a link, or an image of another kind, one of `images.OTHERS`, a sample is damaged; the latter
    only where no image that can be read is beside it.

    Every shard is scanned once, and only the place of each sample is kept, in 16 bytes. Reading a sample is one read,
    in any order, which suits disks with fast random access; for others, and for shards that are not on a local disk,
    see StreamedDataset. The samples before the damage in a damaged shard are used.

    Args:
        pattern: of the files' paths: braces ("cc12m-{00000..01242}.tar", "{a,b}.tar"), a glob ("*.tar"), or both.
        strict: raise BadSample for a damaged shard, instead of a warning.
        channels: of the images, 1 to 16.
    Attributes:
        classes: "0" to the largest `cls`. A sample without one has no label; one with another `cls` is damaged.
        damaged: BadSample for each damaged shard, which says from which byte on it cannot be read.
    Raises:
        FileNotFoundError: a file of the braces is missing, or nothing matches the glob.
        ValueError: there is no sample in any of them, or `cls` are of over 100,000 classes.
        BadSample: with `strict`.
    """

    def __init__(self, pattern: str | os.PathLike, *, strict: bool = False, channels: int = 3):
        self.paths, self.channels = find_shards(str(pattern)), channels
        self.damaged, self._first, self._places, largest = _index(tuple((path, *_version(path)) for path in self.paths))
        for bad in self.damaged:
            if strict:
                raise bad
            warnings.warn(f"{bad}; what comes before is used", M3AEFastWarning, stacklevel=2)
        if not len(self):
            raise ValueError(f"pattern must name .tar files with name.jpg, .png, .txt or .json in them, got {pattern}")
        check_classes(pattern, largest + 1)
        self.classes = tuple(map(str, range(largest + 1)))

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> Sample:
        """The sample, its image still encoded. BadSample: it cannot be read, or holds nothing."""
        key, files = self._files(index)
        sample = sample_of(files, key, self.channels)
        if sample.labels and sample.labels[0] >= len(self.classes):
            raise BadSample(key, "the file has changed", "shard")
        return sample

    def captions(self) -> Iterator[str]:
        """All captions; samples that cannot be read are left out here, and named where they are used."""
        for index in range(len(self)):
            try:
                yield from captions_of(*reversed(self._files(index)))
            except BadSample:
                continue

    def _files(self, index: int) -> tuple[str, dict[str, bytes | Refused]]:
        """The sample's name, and what is in its files, by their suffixes."""
        begin, length = self._places[index].tolist()
        path = self.paths[np.searchsorted(self._first, index, "right") - 1]
        shard, reason = os.path.basename(path), "the file has changed"
        try:
            check_size(length, MAX_BYTES)
            with open_file(path) as file:  # no handle to share between processes, nor thousands of them
                file.seek(begin)
                part = io.BytesIO(file.read(length) + bytes(BLOCK))
            for key, files in samples_in(part, contents):
                return f"{shard}/{key}", files
        except ValueError as error:  # of check_size
            raise BadSample(f"{shard}, byte {begin}", str(error)) from None
        except (OSError, tarfile.TarError) as error:
            reason = str(error)
        raise BadSample(f"{shard}, byte {begin}", reason, "shard")


class _Shard(NamedTuple):
    places: np.ndarray  # [samples, 2] int64: where each begins, and its bytes, headers and all
    largest: int  # of its classes' numbers, -1 where there is no cls
    damage: str  # "" where there is none


def _version(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)  # pictures and scores open the data anew
def _index(versions: tuple[tuple[str, int, int], ...]):
    """Of all shards: (BadSample of each damaged one, the number of each one's first sample, places, largest class)."""
    shards = [_scan(path, size) for path, size, _ in versions]
    damaged = [BadSample(path, s.damage, "shard") for (path, *_), s in zip(versions, shards, strict=True) if s.damage]
    first = np.cumsum([0, *(len(shard.places) for shard in shards)])
    places = np.concatenate([shard.places for shard in shards])
    return tuple(damaged), first, places, max(shard.largest for shard in shards)


def _scan(path: str, size: int) -> _Shard:
    """Goes through a shard from header to header."""
    places, largest, damage = array("q"), -1, ""
    try:
        with open_file(path) as file:
            for _, files in samples_in(file, _place):
                begins, ends, named = zip(*files.values(), strict=True)
                places.extend((begins[0], ends[-1] - begins[0]))
                largest = max(largest, *named)
    except (OSError, tarfile.TarError) as error:
        kept = places[-2] + places[-1] if places else 0
        damage = f"bytes {kept:,} to {size:,} cannot be read ({error})"
    return _Shard(np.array(places, np.int64).reshape(-1, 2), largest, damage)


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, first: int) -> tuple[int, int, int]:
    """Where a file begins, header and all, where it ends, and the class that it names: -1 for none."""
    label = _label(contents(tar, member, first)) if member.name.lower().endswith(".cls") else -1
    return member.offset, tar.offset, label


def _label(data: bytes | Refused) -> int:
    """The class's number that is in a cls file, -1 where none is."""
    number = data.strip()
    return int(min(float(number), 2**31 - 1)) if number.isdigit() else -1  # what is larger is refused with it


def samples_in(file: BinaryIO, take: Callable) -> Iterator[tuple[str, dict]]:
    """The samples of a shard, read forwards: (key, what `take(tar, member, first)` makes of each file, by its suffix;
    `first` is where the first of the sample's headers is).

    A sample is given out when it is known to be whole: the next one, or the end mark, stands behind it.

    Raises:
        tarfile.TarError, OSError: it is damaged; or goes on behind its end mark, as shards do that were concatenated.
    """
    file = _Watched(file)
    key, files, first = None, {}, 0
    for tar, member in _members(file):
        name, suffix = split_name(member.name)
        if member.isdir() or suffix_of(suffix) not in SUFFIXES:
            continue
        if name != key or suffix in files:
            if files:
                yield key, files
            key, files, first = name, {}, member.offset
        elif suffix not in SUFFIXES:  # key.mask.png beside key.png
            continue
        files[suffix] = take(tar, member, first)
    if file.last != bytes(BLOCK):  # tarfile takes a broken header for the end
        raise tarfile.ReadError("there is no end mark")
    if files:
        yield key, files
    padding = 0
    while rest := file.read(1 << 20):
        padding += len(rest)
        if rest.strip(b"\0"):
            raise tarfile.ReadError("there is more behind its end mark: tar -A joins shards, cat does not")
        if padding > MAX_BYTES:
            raise tarfile.ReadError("there is no end to the zeros behind its end mark")


def _members(file: _Watched) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The headers, one after the other. Whatever a forged one makes tarfile raise is a ReadError."""
    try:
        tar = tarfile.TarFile(fileobj=file)
        for member in tar:
            tar.members = []  # or it would keep them all
            if member.size < 0 or tar.offset <= member.offset:  # the same header would come again, without end
                raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
            yield tar, member
    except (MemoryError, OSError, tarfile.TarError):
        raise
    except Exception as error:  # ValueError of a number, OverflowError of a place, RecursionError of a chain of names
        raise tarfile.ReadError(f"a header is damaged ({error})") from error


class Refused(str):
    """Why a file of a shard is not read, in place of what is in it."""


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo, first: int) -> bytes | Refused:
    """What is in a file of the sample that begins at `first`."""
    if member.islnk():
        return Refused("it is a hard link to another file of its shard: they are not followed")
    if member.issym():
        return Refused("it is a symbolic link to another file: they are not followed")
    if member.issparse():
        return Refused("it is a sparse file, which may have any size")
    if not member.isreg():
        return Refused("it is no regular file")
    if suffix_of(member.name) in OTHERS:
        return Refused(not_read(suffix_of(member.name)))
    if tar.offset - first > MAX_BYTES:
        large = "it" if member.size > MAX_BYTES else "its sample"
        return Refused(f"{large} has more than {MAX_BYTES:,} bytes")
    return tar.extractfile(member).read()


class _Watched:
    """A file, and what was read of it last."""

    def __init__(self, file: BinaryIO):
        self._file, self.last = file, b""
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_BYTES:  # of a header that says how long the next one's name is
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self._file.read(size)
        return self.last


def find_shards(pattern: str) -> list[str]:
    """The files that a pattern of braces and wildcards names, in its order, those of a wildcard sorted.

    Raises:
        FileNotFoundError: one of the braces' is not there, or a wildcard matches nothing.
    """
    paths = []
    for name in expand_braces(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not found or not os.path.isfile(found[0]):
            raise FileNotFoundError(f"pattern must name .tar files, there is no {name}")
        paths.extend(found)
    return paths


def expand_braces(pattern: str) -> list[str]:
    """ "a-{00..11}.tar", "{train,val}.tar": every name it stands for, as in bash; other braces are left alone.

    Raises:
        ValueError: it stands for more than MAX_SHARDS names.
    """
    names, waiting = [], [pattern]
    while waiting:
        name = waiting.pop()
        most = math.prod(_count(*braces.groups()) for braces in BRACES.finditer(name))
        if len(names) + len(waiting) + most > MAX_SHARDS:
            raise ValueError(f"pattern must stand for at most {MAX_SHARDS:,} names, got {pattern}")
        braces = BRACES.search(name)
        if not braces:
            names.append(name)
            continue
        first, last, words = braces.groups()
        if words is None:
            step = 1 if int(first) <= int(last) else -1
            width = max(len(first), len(last)) if any(n[0] == "0" and len(n) > 1 for n in (first, last)) else 0
            choices = [str(i).zfill(width) for i in range(int(first), int(last) + step, step)]
        else:
            choices = words.split(",")
        begin, end = name[: braces.start()], name[braces.end() :]
        waiting += [f"{begin}{choice}{end}" for choice in reversed(choices)]
    return names


def _count(first: str | None, last: str | None, words: str | None) -> int:
    return abs(int(first) - int(last)) + 1 if words is None else words.count(",") + 1


def split_name(path: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends, and the suffix begins, at the first dot of the last part of the path; a hidden
    file has neither."""
    folder, slash, name = path.rpartition("/")
    key, _, suffix = name.partition(".")
    return (folder + slash + key, suffix.lower()) if key else ("", "")


def sample_of(files: Mapping[str, bytes | Refused], name: str, channels: int) -> Sample:
    """The sample that a key's files make, by their suffixes, its image still encoded. BadSample: they make none."""
    captions = captions_of(files, name)
    labels = ()
    if "cls" in files:
        labels = (_label(files["cls"]),)
        if labels[0] < 0:
            raise BadSample(f"{name}.cls", f"it must hold a class's number, got {files['cls'][:60]!r}", "label")
    for suffix in IMAGES:
        if suffix in files:
            return Sample(open_image(files[suffix], f"{name}.{suffix}", channels), captions, name, labels)
    if not captions:
        odd = next((suffix for suffix in files if suffix not in SUFFIXES), "")
        why = f": what is behind the key's first dot, .{odd}, is no known suffix" if odd else ""
        raise BadSample(name, f"there is neither an image nor a caption in it{why}")
    return Sample(None, captions, name, labels)


def captions_of(files: Mapping[str, bytes | Refused], name: str) -> tuple[str, ...]:
    """Those of its txt, or else of its json. BadSample: they cannot be read, or another of its files is refused."""
    shown = not files.keys().isdisjoint(IMAGES)
    for suffix, data in files.items():
        if isinstance(data, Refused) and not (shown and suffix in OTHERS):
            raise BadSample(f"{name}.{suffix}", data, "image" if suffix in OTHERS else "sample")
    if "txt" in files:
        return caption_lines(f"{name}.txt", files["txt"])
    if "json" not in files:
        return ()
    try:
        row = parse_object("it", files["json"])
    except ValueError as error:
        raise BadSample(f"{name}.json", str(error), "caption") from None
    return clean_captions(f"{name}.json", row.get("caption"))
