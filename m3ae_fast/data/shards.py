"""TarDataset: WebDataset shards on a local disk, read in any order."""

from __future__ import annotations

import functools
import glob
import io
import json
import os
import re
import tarfile
import warnings
from array import array
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data.images import EncodedDataset, EncodedImage
from m3ae_fast.data.sample import BadSample, Sample, clean_captions

IMAGES = ("jpg", "jpeg", "png")
BLOCK = 512  # of a tar file: headers and contents begin at its multiples


class TarDataset(EncodedDataset):
    """`.tar` files in which what belongs together stands together: `key.jpg` (or jpeg, png), `key.txt` (captions, one a
    line), `key.json` (its "caption", a string or a list), `key.cls` (a class's number).

    Every shard is gone through once, and of each sample only its place is kept: 20 bytes. A sample is one read, so
    any order will do on a disk that finds its place quickly; where it does not, or the shards lie elsewhere, see
    StreamedDataset. Of a damaged shard what comes before the damage is used.

    Args:
        pattern: of the files' paths: braces ("cc12m-{00000..01242}.tar", "{a,b}.tar"), a glob ("*.tar"), or both.
        strict: raise BadSample for a damaged shard, instead of a warning.
    Attributes:
        classes: "0" to the largest `cls`, where every sample has one; else ().
        damaged: BadSample for each damaged shard, which says from which byte on it cannot be read.
    Raises:
        FileNotFoundError: a file of the braces is missing, or nothing matches the glob.
        ValueError: there is no sample in any of them.
        BadSample: with `strict`.
    """

    def __init__(self, pattern: str | os.PathLike, *, strict: bool = False):
        self.paths = find_shards(str(pattern))
        self.damaged, self._first, self._places, labels = _index(tuple((path, *_version(path)) for path in self.paths))
        for bad in self.damaged:
            if strict:
                raise bad
            warnings.warn(f"{bad}; what comes before is used", M3AEFastWarning, stacklevel=2)
        if not len(self):
            raise ValueError(f"pattern must name .tar files with name.jpg, .png, .txt or .json in them, got {pattern}")
        self._labels = labels if labels.min() >= 0 else None
        if self._labels is not None:
            self.classes = tuple(map(str, range(labels.max() + 1)))

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, index: int) -> Sample:
        """The sample, its image still encoded. BadSample: it cannot be read, or holds nothing."""
        key, files = self._files(index)
        labels = () if self._labels is None else (int(self._labels[index]),)
        return sample_of(files, key, labels)

    def captions(self) -> Iterator[str]:
        """All captions; samples that cannot be read are left out here, and named where they are used."""
        for index in range(len(self)):
            try:
                yield from captions_of(*reversed(self._files(index)))
            except BadSample:
                continue

    def _files(self, index: int) -> tuple[str, dict[str, bytes]]:
        """The sample's name, and what is in its files, by their suffixes."""
        begin, length = self._places[index].tolist()
        path = self.paths[np.searchsorted(self._first, index, "right") - 1]
        try:
            with open(path, "rb") as file:  # no handle to share between processes, nor thousands of them
                file.seek(begin)
                with tarfile.open(fileobj=io.BytesIO(file.read(length)), mode="r:") as part:
                    members = {member.name: part.extractfile(member).read() for member in part if member.isreg()}
        except (OSError, tarfile.TarError) as error:
            raise BadSample(f"{os.path.basename(path)}, byte {begin}", str(error), "shard") from error
        key = split_name(next(iter(members), ""))[0]
        return f"{os.path.basename(path)}/{key}", {split_name(name)[1]: data for name, data in members.items()}


class _Shard(NamedTuple):
    places: np.ndarray  # [samples, 2] int64: where each begins, and its bytes, headers and all
    labels: np.ndarray  # [samples] int32, -1 where there is no cls
    damage: str  # "" where there is none


def _version(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)  # pictures and scores open the data anew
def _index(versions: tuple[tuple[str, int, int], ...]):
    """Of all shards: (BadSample of each damaged one, the number of each one's first sample, places, labels)."""
    shards = [_scan(path, size) for path, size, _ in versions]
    damaged = [BadSample(path, s.damage, "shard") for (path, *_), s in zip(versions, shards, strict=True) if s.damage]
    first = np.cumsum([0, *(len(shard.places) for shard in shards)])
    return (
        tuple(damaged),
        first,
        np.concatenate([shard.places for shard in shards]),
        np.concatenate([shard.labels for shard in shards]),
    )


def _scan(path: str, size: int) -> _Shard:
    """Goes through a shard from header to header."""
    places, labels, key, end, damage = array("q"), array("i"), None, 0, ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # or it would keep them all
                name, suffix = split_name(member.name)
                if not member.isreg() or suffix not in (*IMAGES, "txt", "json", "cls"):
                    continue
                if name != key:
                    key = name
                    places.extend((member.offset, 0))
                    labels.append(-1)
                if suffix == "cls":
                    labels[-1] = _label(tar.extractfile(member).read())
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                places[-1] = end - places[-2]
            end = tar.offset
        with open(path, "rb") as file:  # tarfile takes a broken header for the end
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                damage = "there is no end mark"
    except (OSError, tarfile.TarError) as error:
        damage = str(error)
    if damage:
        del places[-2:], labels[-1:]  # it may have lost its caption
        kept = places[-2] + places[-1] if places else 0
        damage = f"bytes {kept:,} to {size:,} cannot be read ({damage})"
    places, labels = np.array(places, np.int64).reshape(-1, 2), np.array(labels, np.int32)
    return _Shard(places, labels, damage)


def _label(data: bytes) -> int:
    return int(data) if data.strip().isdigit() else -1


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
    """ "a-{00..11}.tar", "{train,val}.tar": every name it stands for."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span:
        choices = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = braces[1].split(",")
    begin, end = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in choices for name in expand_braces(f"{begin}{choice}{end}")]


def split_name(path: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends, and the suffix begins, at the first dot of the last part of the path."""
    folder, slash, name = path.rpartition("/")
    key, _, suffix = name.partition(".")
    return folder + slash + key, suffix.lower()


def sample_of(files: Mapping[str, bytes], name: str, labels: tuple[int, ...] = ()) -> Sample:
    """The sample that a key's files make, by their suffixes, its image still encoded. BadSample: they make none."""
    captions = captions_of(files, name)
    for suffix in IMAGES:
        if suffix in files:
            return Sample(EncodedImage(files[suffix], f"{name}.{suffix}"), captions, name, labels)
    if not captions:
        raise BadSample(name, "there is neither an image nor a caption in it")
    return Sample(None, captions, name, labels)


def captions_of(files: Mapping[str, bytes], name: str) -> tuple[str, ...]:
    """Those of its txt, or else of its json. BadSample: they cannot be read."""
    if "txt" in files:
        return clean_captions(f"{name}.txt", files["txt"].splitlines())
    if "json" not in files:
        return ()
    try:
        return clean_captions(f"{name}.json", json.loads(files["json"]).get("caption") or ())
    except (ValueError, AttributeError) as error:
        raise BadSample(f"{name}.json", f"it must be a JSON object: {error}", "caption") from None
