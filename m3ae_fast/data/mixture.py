"""MixedDataset: several data sets in one stream, by weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real

import numpy as np

from m3ae_fast.data.seeds import MIX, generator

BLOCK = 1000  # positions in which each data set has its share to the sample


class MixedDataset:
    """Data sets mixed by weights: of each thousand positions of a `Loader`'s order (0 to 999, 1,000 to 1,999, ...),
    each data set gets a fixed number, its share of the weights rounded to thousandths; their order is drawn anew for
    each thousand.

    Each data set has epochs of its own, in which every sample comes exactly once, however often a smaller data set is
    repeated meanwhile.

    Args:
        sources: the data sets.
        weights: of each, more than 0; what counts is their ratio.
    Attributes:
        classes: those of all data sets, each name once, in the order in which they come.
        shares: samples of each in a thousand.
    Raises:
        ValueError: no data set, one that is empty or itself a mixture, or a weight that is not positive or makes less
            than a thousandth.
    """

    def __init__(self, sources: Sequence, weights: Sequence[float]):
        self.sources, self.weights = tuple(sources), tuple(weights)
        if not self.sources or len(self.sources) != len(self.weights):
            raise ValueError(f"weights must be one for each source, got {len(weights)} for {len(sources)} sources")
        if not all(isinstance(weight, Real) and 0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights must be finite and positive, got {self.weights}")
        if any(isinstance(source, MixedDataset) for source in self.sources):
            raise ValueError("sources must not be mixtures themselves: give theirs, and the products of the weights")
        if not all(map(len, self.sources)):
            raise ValueError("sources must each hold at least one sample, got an empty one")
        self.shares = _rounded(BLOCK * np.array(self.weights, float) / sum(self.weights))
        if not self.shares.all():
            raise ValueError(f"weights must each be at least a thousandth of all, got {self.weights}")
        self.classes = tuple(dict.fromkeys(name for source in self.sources for name in getattr(source, "classes", ())))
        self._block: tuple | None = None  # the last one asked for

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @property
    def held_out(self) -> MixedDataset:
        """What its data sets, each a `Split`, hold out, by the same weights."""
        return MixedDataset([source.held_out for source in self.sources], self.weights)

    def at(self, position: int, seed: int) -> tuple[int, int]:
        """Which data set a position of the endless order belongs to, and how many of its positions come before."""
        if len(self.sources) == 1:
            return 0, position
        block, place = divmod(position, BLOCK)
        order, before = self._pattern(block, seed)
        source = int(order[place])
        return source, block * int(self.shares[source]) + int(before[source, place])

    def count(self, source: int, end: int, seed: int) -> int:
        """How many of the first `end` positions belong to a data set."""
        if len(self.sources) == 1:
            return end
        block, place = divmod(end, BLOCK)
        return block * int(self.shares[source]) + int(self._pattern(block, seed)[1][source, place])

    def captions(self) -> Iterator[str]:
        """Those of all data sets, in turns."""
        left = [source.captions() for source in self.sources]
        while left:
            for captions in tuple(left):
                try:
                    yield next(captions)
                except StopIteration:
                    left.remove(captions)

    def _pattern(self, block: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(data set of each place of a block, [data sets, places] how many of each come before that place)."""
        if self._block is None or self._block[0] != (block, seed):
            order = generator(seed, MIX, block).permutation(np.repeat(np.arange(len(self.sources)), self.shares))
            mine = order == np.arange(len(self.sources))[:, None]
            self._block = (block, seed), order, np.cumsum(mine, axis=1) - mine
        return self._block[1:]


def _rounded(shares: np.ndarray) -> np.ndarray:
    """Whole numbers of the same sum, those with the largest remainders rounded up."""
    whole = np.floor(shares).astype(np.int64)
    whole[np.argsort(whole - shares, kind="stable")[: round(shares.sum()) - whole.sum()]] += 1
    return whole
