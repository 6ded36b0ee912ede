"""The learning rate against values worked out by hand."""

import itertools
import math

import pytest

from m3ae_fast.train import learning_rate


def test_warms_up_in_equal_strides_and_starts_above_zero():
    assert [learning_rate(s, steps=100, warmup=4, peak=2.0) for s in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_falls_as_a_cosine_towards_zero():
    rates = [learning_rate(s, steps=110, warmup=10, peak=1.0) for s in range(10, 110)]
    assert rates[50] == pytest.approx(0.5)
    assert rates[25] == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert 0 < rates[-1] < 1e-3


def test_without_warm_up_it_starts_at_the_peak():
    assert learning_rate(0, steps=10, warmup=0, peak=3.0) == 3.0
