"""Shuffle: every item once, whatever the number, in an order that looks like any other."""

import numpy as np
import pytest

from m3ae_fast.data import shuffle
from m3ae_fast.data.seeds import ORDER, generator
from m3ae_fast.data.shuffle import Shuffle


def order(size, seed=0):
    shuffled = Shuffle(size, generator(seed, ORDER))
    return np.array([shuffled[place] for place in range(size)])


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000])
def test_every_item_once(monkeypatch, size, table):
    monkeypatch.setattr(shuffle, "SMALL", 1 << 16 if table else 0)
    got = order(size)
    assert np.array_equal(np.sort(got), np.arange(size))
    assert np.array_equal(got, order(size)) and (size < 16 or not np.array_equal(got, order(size, seed=1)))


def test_a_large_one_keeps_no_table():
    size = 100_003
    got = order(size)
    assert Shuffle(size, generator(0, ORDER))._table is None
    assert np.array_equal(np.sort(got), np.arange(size))
    # of a random order: no more fixed points, ascents and correlation than five standard deviations allow
    assert (got == np.arange(size)).sum() < 1 + 5
    ascents = (np.diff(got) > 0).mean()
    assert abs(ascents - 0.5) < 5 * np.sqrt(1 / 12 / size)
    for a, b in ((got, np.arange(size)), (got[1:], got[:-1]), (got, order(size, seed=1))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)
    steps = np.bincount(np.abs(np.diff(got)) % 16, minlength=16) / (size - 1)
    assert abs(steps - 1 / 16).max() < 5 * np.sqrt(1 / 16 / size)


def test_twelve_million_rows_take_no_memory():
    large = Shuffle(12_423_374, generator(3, ORDER))
    seen = {large[place] for place in range(2000)}
    assert len(seen) == 2000 and max(seen) < 12_423_374
    with pytest.raises(IndexError, match=r"place must be in \[0, 12423374\), got 12423374"):
        large[12_423_374]
