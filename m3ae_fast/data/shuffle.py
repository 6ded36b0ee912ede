"""Shuffle: a random order of any number of items, in little memory."""

from __future__ import annotations

import numpy as np

SMALL = 1 << 16
ROUNDS = 8
WORD = 2**64 - 1


class Shuffle:
    """A permutation of range(size): `shuffle[place]` is the item at that place.

    Up to SMALL items, all orders are equally likely. Of more no table is kept, which would take 96 MB in every worker
    for 12 million rows: a Feistel network permutes the numbers of 2b bits, the smallest b that covers `size`; a number
    outside is permuted again until it is inside, at most four times on average.

    Args:
        size: of items, at least one.
        rng: draws the keys, on which alone the order depends.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        self.size = size
        if size <= SMALL:
            self._table = rng.permutation(size)
            return
        self._table = None
        self._bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = rng.integers(2**64, size=ROUNDS, dtype=np.uint64).tolist()

    def __getitem__(self, place: int) -> int:
        """IndexError: outside [0, size)."""
        if not 0 <= place < self.size:
            raise IndexError(f"place must be in [0, {self.size}), got {place}")
        if self._table is not None:
            return int(self._table[place])
        bits, mask = self._bits, (1 << self._bits) - 1
        while True:
            left, right = place >> bits, place & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            place = left << bits | right
            if place < self.size:
                return place


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): each bit of x changes about half of the result's."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31
