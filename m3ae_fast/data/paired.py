"""PairedShare: a data set most of whose images have lost their captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from m3ae_fast import _checks
from m3ae_fast.data.sample import Derived, Sample
from m3ae_fast.data.seeds import PAIRED, check_seed, generator


class PairedShare(Derived):
    """A data set in which a fixed share of the images keep their captions and the others are images alone, as in the
    ablation of arXiv:2205.14204. Texts without an image stay.

    Args:
        dataset: of `Sample`s.
        share: in (0, 1]; each image is drawn independently, so a small data set keeps about that share.
        seed: of the draw, in [0, 2**63). number: distinguishes data sets that are mixed and share the seed.
    """

    def __init__(self, dataset: Sequence[Sample], share: float, seed: int, number: int = 0):
        _checks.real("share", share, "(0, 1]")
        if not hasattr(dataset, "__getitem__"):
            raise TypeError(f"dataset must have numbered samples, got {type(dataset).__name__}")
        super().__init__(dataset)
        self.share, self.seed, self.number = share, check_seed(seed), number
        self.endless = getattr(dataset, "endless", False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self._stripped(self.dataset[index], index)

    def read(self, index: int) -> Sample:
        """As `dataset[index]`; the image may be an EncodedImage."""
        return self._stripped(self._read(index), index)

    def _stripped(self, sample: Sample, index: int) -> Sample:
        if sample.image is None or self.keeps(index):
            return sample
        return dataclasses.replace(sample, captions=())

    def keeps(self, index: int) -> bool:
        """Whether image `index` keeps its captions."""
        return generator(self.seed, PAIRED, index=index, source=self.number).random() < self.share
