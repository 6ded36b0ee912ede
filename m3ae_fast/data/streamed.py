"""StreamedDataset: WebDataset shards that lie elsewhere, read from their beginnings by the webdataset library."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from m3ae_fast import _checks
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.remote import open_url, opener
from m3ae_fast.data.sample import Sample
from m3ae_fast.data.seeds import ORDER, generator
from m3ae_fast.data.shards import Refused, captions_of, contents, expand_braces, sample_of, samples_in

MAX_HELD = 1 << 28  # bytes of samples that wait to be drawn: 1,000 of 268 kB
FIRST_UNREACHED, MOST_UNREACHED = 3, 10  # shards in a row of which not a byte came: before any other one did, and after


class StreamedDataset:
    """Shards named by URLs (http, https, gs: what webdataset opens) or by commands ("pipe:aws s3 cp s3://... -").

    Nothing is known about a stream before it is read, so it guarantees less than other data sets:

    - In each epoch the shards are put in an order drawn from (seed, epoch) and distributed over all workers of all
      ranks, each of which walks through epochs of its own shards. Every sample is read by one of them, once in such an
      epoch; but which batch it is in depends on the number of workers, and a worker with fewer samples begins its next
      epoch earlier.
    - Samples of a shard follow one another, through a buffer from which one is drawn at random. It holds 256 MiB at
      most, so fewer samples where they are large.
    - The same numbers of ranks and workers give the same batches. A run that is resumed with the same numbers continues
      exactly, but what it has used is read again and discarded, which takes long for a long run.
    - Of a damaged shard what comes before the damage is used; the damage is met, and counted, in every epoch.
    - A transfer by http, https, sftp or ftps that breaks off, or stalls for a minute, is resumed a few times. When not
      a byte comes of 3 shards in a row at the beginning, or of 10 later, it is a ConnectionError.

    Args:
        pattern: of the URLs, with braces: "https://host/cc12m-{00000..01242}.tar".
        buffer: samples, still encoded, of which one is drawn, or all that 256 MiB hold; 1: the shards' own order.
        channels: of the images, 1 to 16.
    Attributes:
        urls: of the shards.
        classes: (): those of a stream are not known.
    Raises:
        ModuleNotFoundError: webdataset is missing. ValueError: it does not know how to open such a URL, or the
            shards are compressed.
    """

    flip_safe = True
    crop_scale = (0.2, 1.0)
    endless = True  # as far as anybody knows
    classes: tuple[str, ...] = ()

    def __init__(self, pattern: str, *, buffer: int = 1000, channels: int = 3):
        _checks.integer("buffer", buffer, 1)
        self.urls, self.buffer, self.channels = expand_braces(pattern), buffer, channels
        schemes = opener().gopen_schemes
        scheme = pattern.partition(":")[0]
        if scheme not in schemes:
            known = ", ".join(sorted(name for name in schemes if name.isalnum()))
            raise ValueError(f"pattern must begin with one of {known}, got {pattern}; pipe:COMMAND opens any other")
        if re.search(r"\.(tar\.\w+|tgz)$", pattern.partition("?")[0]):
            raise ValueError(f"pattern must name .tar files that are not compressed, got {pattern}")

    def __len__(self) -> int:
        """Not known: more than will ever be read."""
        return 2**31 - 1

    def check_readers(self, readers: int) -> None:
        """ValueError: there are fewer shards than readers."""
        if len(self.urls) < readers:
            raise ValueError(
                f"pattern must name a shard for each reader, ranks x workers = {readers}, got {len(self.urls)}"
            )

    def stream(self, seed: int, reader: int, readers: int, source: int = 0) -> Iterator[Entry]:
        """What one of the readers reads, without end.

        Args:
            seed: of the orders. reader, readers: its number, and how many there are.
            source: number of the data set, where several are mixed.
        Raises:
            ValueError: there are fewer shards than readers. ConnectionError: of many in a row not a byte came.
        """
        self.check_readers(readers)
        outage = _Outage()
        for epoch in itertools.count():
            order = generator(seed, ORDER, epoch, source=source).permutation(len(self.urls))
            entries = _read((self.urls[i] for i in order[reader::readers]), outage)
            yield from _shuffled(entries, self.buffer, generator(seed, ORDER, epoch, reader + 1, source))

    def captions(self) -> Iterator[str]:
        """Those of the shards in the order of their names, read as far as they are asked for."""
        for entry in _read(self.urls, _Outage()):
            try:
                yield from captions_of(entry.files, entry.name)
            except BadSample:
                continue


class Entry(NamedTuple):
    """A sample as it is stored; or what is wrong with a shard, in place of its rest."""

    name: str
    files: dict[str, bytes | Refused]  # by their suffixes
    damage: str = ""

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(map(len, self.files.values()))

    def sample(self, channels: int = 3) -> Sample:
        """The sample, its image still encoded, of so many channels. BadSample: there is none."""
        if self.damage:
            raise BadSample(self.name, self.damage, "shard")
        return dataclasses.replace(sample_of(self.files, self.name, channels), labels=())


class _Outage:
    """Counts the shards in a row of which not a byte came."""

    def __init__(self):
        self._shards, self._most = 0, FIRST_UNREACHED

    def count(self, url: str, reached: bool, damage: str) -> None:
        """ConnectionError: there are so many that it must be the server, or the pattern."""
        if reached:
            self._shards, self._most = 0, MOST_UNREACHED
            return
        self._shards += 1
        if self._shards == self._most:
            raise ConnectionError(f"{self._shards} shards in a row could not be read, the last: {url}: {damage}")


def _read(urls: Iterable[str], outage: _Outage) -> Iterator[Entry]:
    """The samples of all shards, and after those of a damaged one what is wrong with it."""
    for url in urls:
        damage, reached = "there is no sample in it", False
        try:
            with contextlib.closing(open_url(url)) as stream:
                forward = _Forward(stream)
                try:
                    for key, files in samples_in(forward, contents):
                        damage = ""
                        yield Entry(f"{url}: {key}", files)
                finally:
                    reached = forward.tell() > 0
        except (OSError, tarfile.TarError) as error:
            damage = str(error)
        outage.count(url, reached, damage)
        if damage:
            yield Entry(url, {}, damage)


class _Forward:
    """A stream as a file that is read forwards: all that tarfile asks of one."""

    def __init__(self, stream):
        self._stream, self._position = stream, 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def seek(self, position: int) -> None:
        while self._position < position and self.read(min(position - self._position, 1 << 20)):
            pass


def _shuffled(entries: Iterable[Entry], count: int, rng: np.random.Generator) -> Iterator[Entry]:
    """In another order: one of those held is drawn as soon as they are `count`, or more than MAX_HELD bytes."""
    held, size = [], 0
    for entry in entries:
        held.append(entry)
        size += entry.size
        while len(held) == count or size > MAX_HELD:
            i = rng.integers(len(held))
            held[i], held[-1] = held[-1], held[i]
            size -= held[-1].size
            yield held.pop()
    yield from (held[i] for i in rng.permutation(len(held)))
