"""Split: a data set without a share of its samples, or that share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3ae_fast import _checks
from m3ae_fast.data.sample import Derived, Sample
from m3ae_fast.data.seeds import SPLIT, generator


class Chosen(Derived, Sequence):
    """Some samples of a data set, in the order given, as `Loader` takes them.

    Args:
        dataset: of samples. chosen: their numbers.
    """

    classes, flip_safe, crop_scale = (), True, (0.2, 1.0)

    def __init__(self, dataset: Sequence[Sample], chosen: Sequence[int]):
        super().__init__(dataset)
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample."""
        return self.dataset[int(self._chosen[index])]

    def read(self, index: int) -> Sample:
        """As [index]; the image may be an EncodedImage. Raises BadSample."""
        return self._read(int(self._chosen[index]))


class Split(Chosen):
    """The samples that are trained on, or those held out for validation.

    Each sample is drawn independently, by its number in the data set alone: the same ones are held out for any seed of
    a run, in any mixture, and after samples are appended. The vocabulary is learned from the captions of both parts.

    Args:
        dataset: of samples, which can be asked for by number.
        share: held out, in (0, 1): about that share of them.
        is_held_out: which part this is.
    Raises:
        ValueError: an endless data set, or one of which a part would be empty.
    """

    def __init__(self, dataset: Sequence[Sample], share: float, *, is_held_out: bool = False):
        _checks.real("share", share, "(0, 1)")
        if getattr(dataset, "endless", False):
            raise ValueError("val_share must be 0 for data without an end, such as shapes, or streamed: use val_data")
        drawn = generator(0, SPLIT).random(len(dataset)) < share
        if drawn.all() or not drawn.any():
            held_out = f"which holds out {drawn.sum()} of {len(dataset)}"
            raise ValueError(f"val_share must leave samples to train on and to hold out, got {share:g}, {held_out}")
        super().__init__(dataset, np.flatnonzero(drawn == is_held_out))
        self._share = share

    @property
    def held_out(self) -> Split:
        """The samples that are held out."""
        return Split(self.dataset, self._share, is_held_out=True)
