"""The samples that features are extracted from: some of a data set, whole or cropped at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from m3ae_fast import _checks
from m3ae_fast.data.images import augment
from m3ae_fast.data.sample import Sample
from m3ae_fast.data.seeds import SAMPLE, generator
from m3ae_fast.data.specs import open_dataset
from m3ae_fast.data.split import Chosen

COUNT = 1000  # of drawn samples, where none is given


def open_some(
    spec: str, *, image_size: int | tuple[int, int], channels: int = 3, seed: int = 0, count: int | None = None
) -> Some:
    """Samples of a data set, labels or not.

    Args:
        spec, image_size, channels, seed: as of `open_dataset`. count: as of `Some`.
    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: no such folder, or nothing in it.
    """
    return Some(open_dataset(spec, image_size=image_size, channels=channels, seed=seed), count)


def open_classes(
    spec: str, *, image_size: int | tuple[int, int], channels: int = 3, seed: int = 0, count: int | None = None
) -> Some:
    """Images of one class each, a folder with a subfolder for each class for instance. Arguments and errors as those of
    `open_some`; ValueError, too: there are no classes."""
    dataset = open_dataset(spec, image_size=image_size, channels=channels, seed=seed)
    if not getattr(dataset, "classes", ()):
        beside = getattr(dataset, "no_classes", "")
        why = f": {beside} lies beside them" if beside else ""
        raise ValueError(f"{spec} must have classes, a subfolder for each of two or more, got none{why}")
    return Some(dataset, count)


class Some(Chosen):
    """Some samples of a data set, as `Loader` takes them: of a folder spread evenly, for it is sorted by class; of
    synthetic scenes the first.

    Args:
        dataset: of samples, with `classes` if they have labels.
        count: of samples, at most; None: all, of synthetic scenes 1000.
    Raises:
        ValueError: the data set is a mixture or a stream, of which no sample can be asked for by its number.
    """

    def __init__(self, dataset: Sequence[Sample], count: int | None = None):
        if count is not None:
            _checks.integer("count", count, 1)
        if not hasattr(dataset, "__getitem__"):
            kind = type(dataset).__name__
            raise ValueError(f"dataset must be one whose samples can be asked for by number, got a {kind}")
        size = len(dataset)
        if getattr(dataset, "endless", False):
            chosen = range(min(count or COUNT, size))
        else:
            count = min(count or size, size)
            chosen = [i * size // count for i in range(count)]
        super().__init__(dataset, chosen)


class Crops(Sequence):
    """Each sample a number of times, all of them once, then all again, each time another random crop of 8 to 100 % of
    the area and mirrored half of the time: what a probe is fitted to in arXiv:2111.06377. Synthetic scenes are whole,
    as they are in training, and where captions speak of left and right nothing is mirrored.

    Args:
        samples: to be cropped. count: of crops of each. size: pixels a side, or (height, width). seed: of the crops.
    """

    def __init__(self, samples: Some, count: int, size: int | tuple[int, int], seed: int = 0):
        _checks.integer("count", count, 1)
        self._samples, self._count, self._size, self._seed = samples, count, size, seed
        self.classes = samples.classes

    def __len__(self) -> int:
        return self._count * len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample. IndexError: outside [0, len)."""
        if not 0 <= index < len(self):  # or iteration would never end
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        turn, index = divmod(index, len(self._samples))
        sample, rng = self._samples.read(index), generator(self._seed, SAMPLE, turn, index)
        if sample.image is None:
            return sample
        scale = None if self._samples.crop_scale is None else (0.08, 1.0)
        image = augment(sample.image, self._size, rng, scale=scale, flip=self._samples.flip_safe)
        return dataclasses.replace(sample, image=image)
