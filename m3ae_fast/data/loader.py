"""Loader: an endless stream of batches that depends on (seed, step) alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from m3ae_fast import _checks
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data.ahead import Ahead
from m3ae_fast.data.bad_sample import BadSample
from m3ae_fast.data.images import augment, center_crop, keep_aspect, stack, tensors
from m3ae_fast.data.mixture import MixedDataset
from m3ae_fast.data.sample import Sample
from m3ae_fast.data.seeds import ORDER, SAMPLE, check_seed, generator
from m3ae_fast.data.shuffle import Shuffle
from m3ae_fast.data.streamed import StreamedDataset
from m3ae_fast.data.text import Tokenizer

COUNTERS = ("seen", "images_skipped", "texts_cut", "captions_empty")
MAX_WARNINGS = 20  # of bad samples: a web-scale data set has thousands
MAX_TRIES = 1000  # samples in a row that cannot be read, after which the data set itself is at fault
MAX_LEFT_OUT = 100_000  # samples in a row that are not of the kind wanted, after which there may be none
LEFT_OUT = ("unpaired", "unlabeled")  # BadSample.kind where nothing is damaged: pairs_only, labeled_only
MAX_DEATHS = 3  # of workers without a batch between them, after which it is the batch that kills them


class Loader:
    """Iterates over (step, ImageTextBatch), from `start_step` on, without end.

    Batch `step` holds positions step * batch_size + i of an endless order: epoch after epoch, each a permutation of
    the data set drawn from (seed, epoch). Crops, mirroring and the choice of a caption are drawn from
    (seed, epoch, index). So batches are the same for any number of workers, and after any resume, and grouping
    the order into batches of another size changes no sample. The position is the sample's id, by which masks
    are keyed: an image gets a new mask in every epoch. This holds for each data set of a MixedDataset; a
    StreamedDataset guarantees less (see there).

    A sample that cannot be read is replaced by the next good one of its epoch, and counted; there is a warning for each
    of the first files. When a worker process dies, all are started again at the batch that is due, with a warning: no
    batch is lost.

    Args:
        dataset: a MixedDataset, a StreamedDataset, or a sequence of `Sample`s, whose `__getitem__` may raise BadSample;
            one with a `read` is an EncodedDataset, of whose images only what is needed is decoded. Attributes:
            `flip_safe` (default True: images may be mirrored), `crop_scale` (default (0.2, 1): shares of the area that
            random crops keep; None: no random crops), `endless` (default False: True keeps the data set's own order, so
            that no permutation of it is ever in memory), `classes` (names, default none: what `labels` count).
        tokenizer: a `Tokenizer`, or any object with its `encode`; None: images alone, captions are left out.
        image_size: pixels a side, or (height, width), of the images in the batches.
        max_patches: instead, batches hold whole images of mixed sizes, each resized to the largest number of patches,
            at most this one, that its aspect allows (`data.images.native_grid`). None: images are cropped. patch_size:
            pixels a side of a patch.
        batch_size: samples in a batch.
        seed: of order, crops and choices, in [0, 2**63).
        max_text_length: words (vocabulary entries) after which a text is cut.
        start_step: the first step.
        workers: processes that read ahead; 0 reads in this one.
        strict: raise BadSample where a sample cannot be read, instead of replacing it.
        augment: random crops (not of whole images) and mirroring; False: center crops, for evaluation.
        pairs_only: samples that are not an image with a caption are replaced and counted, as "unpaired", with one
            warning, and not decoded. labeled_only: the same for samples without a label, "unlabeled".
        rank, world_size: of this process, where several share the work. Each gets batches of `batch_size` of its own,
            together those of one process with world_size * batch_size samples in a batch.
        pin_memory: batches and plans lie in page-locked memory, for a GPU. A thread of this process then pins them, and
            makes the plans, while the caller works on the batch before.
        plan: plan(batch, step) makes what is handed over with a batch, as `M3AE.plan` does. None: nothing.

    Yields:
        step, and a batch whose images are uint8 [N, C, height, width] in channels-last memory, or patches of images
        (`ImageTextBatch.from_images`) where max_patches is given; texts int32;
        where `plan` is given, its plan, too.

    Attributes:
        counters: of the batches given out by this loader: `seen` samples, `images_skipped` (samples that could not
            be read and were replaced), `texts_cut`, `captions_empty` (captions without a word: the image alone).
        images: given out. wait_seconds: spent waiting for batches. read_seconds: spent making them, by all workers.
        skipped: how many samples were replaced, by what was damaged (BadSample.kind) or why they were left out.
        bad: BadSample by name, of damaged shards and of the first samples that were met, 20 in all or as many shards.
        workers_died: how often workers were started again.

    Raises:
        ValueError, TypeError: an argument, or a data set without one sample that can be read.
        BadSample: with `strict`. ChildProcessError: workers died repeatedly at the same batch.
    """

    def __init__(
        self,
        dataset: Sequence[Sample],
        tokenizer: Tokenizer | None,
        *,
        image_size: int | tuple[int, int],
        batch_size: int,
        seed: int = 0,
        max_text_length: int = 64,
        start_step: int = 0,
        workers: int = 0,
        strict: bool = False,
        augment: bool = True,
        pairs_only: bool = False,
        labeled_only: bool = False,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        plan: Callable[[ImageTextBatch, int], Any] | None = None,
        max_patches: int | None = None,
        patch_size: int | None = None,
    ):
        image_size = _checks.sides("image_size", image_size)
        if max_patches is not None:
            _checks.integer("max_patches", max_patches, 1)
            _checks.integer("patch_size", patch_size, 1)
        _checks.integer("batch_size", batch_size, 1)
        _checks.integer("max_text_length", max_text_length, 1)
        _checks.integer("start_step", start_step, 0)
        _checks.integer("workers", workers, 0)
        _checks.integer("world_size", world_size, 1)
        _checks.integer("rank", rank, 0, world_size)
        if not len(dataset):
            raise ValueError("dataset must hold at least one sample, got an empty one")
        mixture = dataset if isinstance(dataset, MixedDataset) else MixedDataset([dataset], [1])
        batches = _Batches(
            mixture,
            tokenizer,
            image_size,
            batch_size,
            check_seed(seed),
            max_text_length,
            strict,
            augment,
            pairs_only,
            labeled_only,
            readers=world_size * max(1, workers),
            max_patches=max_patches,
            patch_size=patch_size,
        )
        self._numbers = _Numbers(start_step * world_size + rank, world_size)
        self._loader = DataLoader(
            batches,
            batch_size=None,  # an item is a whole batch already
            sampler=self._numbers,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # its own, or starting to iterate would advance torch's
        )
        self._world_size, self._pin_memory, self._has_plan = world_size, pin_memory, plan is not None
        self._finish = functools.partial(_finished, world_size, plan, pin_memory)
        self._batches: Iterator[_Loaded | Exception] | None = None
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.images, self.wait_seconds, self.read_seconds = 0, 0.0, 0.0
        self.skipped: Counter[str] = Counter()
        self.bad = {bad.name: bad for source in mixture.sources for bad in getattr(source, "damaged", ())}
        self.workers_died = 0

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[int, ImageTextBatch] | tuple[int, ImageTextBatch, Any]:
        start = time.perf_counter()
        loaded = self._next()
        self.wait_seconds += time.perf_counter() - start
        if not self._pin_memory:
            loaded = self._finish(loaded)
        if isinstance(loaded, Exception):
            self.close()
            raise loaded
        self._numbers.start = loaded.number + self._world_size
        for name, count in loaded.counters.items():
            self.counters[name] += count
        self.images += sum(loaded.batch.has_image)
        self.read_seconds += loaded.seconds
        for bad in loaded.skipped:
            self._note(bad)
        return loaded.number // self._world_size, loaded.batch, *((loaded.plan,) if self._has_plan else ())

    def _note(self, bad: BadSample) -> None:
        self.skipped[bad.kind] += 1
        if bad.kind in LEFT_OUT:
            if self.skipped[bad.kind] == 1:
                warnings.warn(f"{bad}; left out, as all such will be", M3AEFastWarning, stacklevel=3)
            return
        if bad.name in self.bad or len(self.bad) >= MAX_WARNINGS:
            return
        self.bad[bad.name] = bad
        more = "; further ones are counted, not named" if len(self.bad) == MAX_WARNINGS else ""
        message = f"{bad}; skipped (bad files so far: {len(self.bad)}{more})"
        warnings.warn(message, M3AEFastWarning, stacklevel=3)

    def _next(self) -> _Loaded | Exception:
        """The batch that is due. A batch is a function of its number: workers that died are started again at it."""
        for _ in range(MAX_DEATHS):
            try:
                if self._batches is None:
                    with _no_alarm(), torch.device("cpu"):  # where DataLoader draws a seed
                        batches = iter(self._loader)
                    self._batches = Ahead(map(self._finish, batches)) if self._pin_memory else batches
                return next(self._batches)
            except (RuntimeError, EOFError, OSError) as error:  # the latter two: it died while sending
                if not self._loader.num_workers or "in DataLoader worker process" in str(error):  # the data set's own
                    raise
                self._batches, death = None, str(error) or type(error).__name__
            self.workers_died += 1
            step = self._numbers.start // self._world_size
            warnings.warn(f"{death}; started again at batch {step}", M3AEFastWarning, stacklevel=3)
        raise ChildProcessError(
            f"workers died {MAX_DEATHS} times at batch {step}, the last: {death}; the system may have killed them for "
            "memory (fewer workers need less), or a file crashes its reader (workers=0 shows where)"
        )

    def close(self) -> None:
        """End the worker processes; the stream ends with them."""
        batches, self._batches = self._batches, iter(())
        if isinstance(batches, Ahead):
            batches.close()


class _Loaded(NamedTuple):
    """What a worker sends back. number: of the batch; those of a step go to one rank after the other."""

    number: int
    batch: ImageTextBatch
    counters: Counter
    skipped: list[BadSample]
    seconds: float  # that it took to make
    plan: Any = None


def _finished(
    world_size: int, plan: Callable | None, pin_memory: bool, loaded: _Loaded | Exception
) -> _Loaded | Exception:
    """With its plan, and pinned. An error is returned: one that was raised might be taken for a worker's death."""
    if isinstance(loaded, Exception):
        return loaded
    try:
        batch = loaded.batch
        planned = None if plan is None else plan(batch, loaded.number // world_size)
        if pin_memory:
            batch, planned = batch.pin_memory(), None if planned is None else planned.pin_memory()
        return loaded._replace(batch=batch, plan=planned)
    except Exception as error:
        return error


class _Prepared(NamedTuple):
    image: np.ndarray | None  # [height, width, C] uint8
    ids: list[int]
    labels: tuple[int, ...]
    source: int
    facts: frozenset[str]  # of the image
    says: frozenset[str]  # the caption; empty: not known


class _Numbers(Sampler):
    def __init__(self, start: int, stride: int):
        self.start, self.stride = start, stride

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start, self.stride)


def _as_it_is(loaded):
    return loaded


@contextlib.contextmanager
def _no_alarm():
    """Takes back the signal handler that torch sets when it starts workers: it raises an error wherever the program is,
    in the midst of a step, when one of them dies. Without it, the next batch asked for tells, within seconds."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield  # nor does torch set it here
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        torchs = getattr(before, "__module__", None) == signal_handling.__name__  # of an earlier DataLoader
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs or before is None else before)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal: the main one decides what becomes of the run, and ends these.

    torchrun sends SIGTERM, too, to all of a process's group; one that ignored it could not be ended by its loader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if dist.is_torchelastic_launched():
        os.setpgid(0, 0)


class _Source:
    """One of the data sets that are mixed, in the order of its samples."""

    def __init__(self, dataset: Sequence[Sample], number: int, classes: tuple[str, ...], seed: int):
        self.read = getattr(dataset, "read", dataset.__getitem__)
        self.size, self.number, self.seed = len(dataset), number, seed
        self.flip = getattr(dataset, "flip_safe", True)
        self.crop_scale = getattr(dataset, "crop_scale", (0.2, 1.0))
        self.endless = getattr(dataset, "endless", False)
        numbers = {name: number for number, name in enumerate(classes)}
        self.classes = [numbers[name] for name in getattr(dataset, "classes", ())]
        self._epoch: tuple[int, Shuffle] | None = None  # the last epoch asked for, and its order

    def at(self, turn: int, offset: int) -> tuple[Sample, np.random.Generator]:
        """The sample of its `turn`th position, or one `offset` further in the same epoch, and its random numbers.

        Raises:
            BadSample: it cannot be read.
        """
        epoch, place = divmod(turn, self.size)
        place = (place + offset) % self.size
        if self.endless:
            index = place
        else:
            if self._epoch is None or self._epoch[0] != epoch:
                order = Shuffle(self.size, generator(self.seed, ORDER, epoch, source=self.number))
                self._epoch = epoch, order
            index = self._epoch[1][place]
        return self.read(index), generator(self.seed, SAMPLE, epoch, index, self.number)


class _Stream(_Source):
    """The same of a StreamedDataset: positions are asked for in the order in which its samples come."""

    def __init__(self, dataset: StreamedDataset, number: int, seed: int, readers: int):
        dataset.check_readers(readers)
        self.dataset, self.size, self.number, self.seed = dataset, len(dataset), number, seed
        self.flip, self.crop_scale, self.classes = dataset.flip_safe, dataset.crop_scale, ()

    def start(self, reader: int, readers: int, done: int) -> None:
        """As one of the readers, which has given out `done` samples before."""
        entries = self.dataset.stream(self.seed, reader, readers, self.number)
        self._entries, self._ahead, self._turn = itertools.islice(entries, done, None), deque(), None

    def at(self, turn: int, offset: int) -> tuple[Sample, np.random.Generator]:
        if turn != self._turn:
            if self._turn is not None:
                self._ahead.popleft()
            self._turn = turn
        while len(self._ahead) <= offset:
            self._ahead.append(next(self._entries))
        return self._ahead[offset].sample(self.dataset.channels), generator(self.seed, SAMPLE, 0, turn, self.number)


@dataclasses.dataclass
class _Batches(Dataset):
    """Batch by number. A worker holds a copy of it."""

    mixture: MixedDataset
    tokenizer: Tokenizer | None
    image_size: tuple[int, int]
    batch_size: int
    seed: int
    max_text_length: int
    strict: bool
    augment: bool
    pairs_only: bool
    labeled_only: bool
    readers: int  # workers of all ranks: batches are dealt out to them in turns
    max_patches: int | None
    patch_size: int | None

    def __post_init__(self):
        self.sources = [
            _Stream(source, i, self.seed, self.readers)
            if isinstance(source, StreamedDataset)
            else _Source(source, i, self.mixture.classes, self.seed)
            for i, source in enumerate(self.mixture.sources)
        ]
        self._next: int | None = None  # the batch that streams are ready for

    def __getitem__(self, number: int) -> _Loaded | Exception:
        """An error is returned, to be raised by the loader: on the way out of a worker, one raised becomes another."""
        try:
            return self._batch(number)
        except (BadSample, ValueError, TypeError, OSError) as error:  # the caller's; a bug keeps its worker's traceback
            return error

    def _batch(self, number: int) -> _Loaded:
        start = time.perf_counter()
        if number != self._next:
            self._start_streams(number)
        self._next = number + self.readers
        counters, skipped = Counter(), []
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        prepared = [self._at(position, counters, skipped) for position in positions]
        counters.update(seen=len(prepared), images_skipped=sum(bad.kind not in LEFT_OUT for bad in skipped))
        images = [sample.image for sample in prepared if sample.image is not None]
        ids = [sample.ids for sample in prepared]
        text = torch.tensor([i for each in ids for i in each], dtype=torch.int32, device="cpu"), list(map(len, ids))
        about = {
            "has_image": [sample.image is not None for sample in prepared],
            "sample_ids": positions,
            "labels": self._labels(prepared),
            **_facts(prepared),
        }
        if images and self.max_patches is not None:
            batch = ImageTextBatch.from_images(tensors(images), *text, patch_size=self.patch_size, **about)
        else:
            batch = ImageTextBatch(stack(images) if images else None, *text, **about)
        return _Loaded(number, batch, counters, skipped, time.perf_counter() - start)

    def _start_streams(self, number: int) -> None:
        reader, size = number % self.readers, self.batch_size
        for i, source in enumerate(self.sources):
            if isinstance(source, _Stream):
                count = functools.partial(self.mixture.count, i, seed=self.seed)
                before = range(reader, number, self.readers)
                source.start(reader, self.readers, sum(count(n * size + size) - count(n * size) for n in before))

    def _labels(self, prepared: list[_Prepared]) -> torch.Tensor | None:
        if not self.mixture.classes:
            return None
        labels = torch.zeros(len(prepared), len(self.mixture.classes), dtype=torch.bool, device="cpu")
        for row, sample in zip(labels, prepared, strict=True):
            row[list(sample.labels)] = True
        return labels

    def _at(self, position: int, counters: Counter, skipped: list[BadSample]) -> _Prepared:
        """The sample at a position of the endless order, or the next good one of its epoch."""
        number, turn = self.mixture.at(position, self.seed)
        source = self.sources[number]
        damaged = 0
        for offset in range(min(source.size, MAX_LEFT_OUT)):
            try:
                return self._prepare(*source.at(turn, offset), source, counters)
            except BadSample as bad:
                skipped.append(bad)
                if bad.kind not in LEFT_OUT:
                    if self.strict:
                        raise
                    damaged += 1
                    if damaged == MAX_TRIES:
                        break
        wanted = "that can be read" if damaged else "of the kind wanted"
        raise ValueError(f"dataset must hold samples {wanted}, none of {offset + 1} could be used; {skipped[-1]}")

    def _prepare(self, sample: Sample, rng: np.random.Generator, source: _Source, counters: Counter) -> _Prepared:
        if self.labeled_only and not sample.labels:
            raise BadSample(sample.name, "labels are wanted, there is none", "unlabeled")
        ids, says = [], frozenset()
        captioned = bool(sample.captions) and self.tokenizer is not None
        if captioned:
            chosen = rng.integers(len(sample.captions))
            ids = self.tokenizer.encode(sample.captions[chosen])
            says = sample.says[chosen] if sample.says else says
        if self.pairs_only and (sample.image is None or not ids):
            missing = "image" if sample.image is None else "caption"
            raise BadSample(sample.name, f"pairs are wanted, there is no {missing}", "unpaired")
        if sample.image is None:
            if not ids:
                raise BadSample(sample.name, "there is neither an image nor a word in it")
            image = None
        elif self.max_patches is not None:
            mirror = rng if self.augment and source.flip else None
            image = keep_aspect(sample.image, self.patch_size, self.max_patches, mirror=mirror)
        elif self.augment:
            image = augment(sample.image, self.image_size, rng, scale=source.crop_scale, flip=source.flip)
        else:
            image = center_crop(sample.image, self.image_size)
        counters.update(texts_cut=len(ids) > self.max_text_length, captions_empty=captioned and not ids)
        labels = tuple(source.classes[label] for label in sample.labels)
        return _Prepared(image, ids[: self.max_text_length], labels, source.number, sample.facts, says)


def _facts(prepared: Sequence[_Prepared]) -> dict[str, torch.Tensor]:
    """A batch's `facts` and `says`; {}: no data set knows of any."""
    if not any(sample.says for sample in prepared):
        return {}
    return {name: _numbers_of(prepared, name) for name in ("facts", "says")}


def _numbers_of(prepared: Sequence[_Prepared], name: str) -> torch.Tensor:
    """[B, most facts] int64: the same fact of the same data set has the same number in every process."""
    rows = [[_fact_number(sample.source, fact) for fact in sorted(getattr(sample, name))] for sample in prepared]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64, device="cpu")


def _fact_number(source: int, fact: str) -> int:
    digest = hashlib.blake2b(f"{source} {fact}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
