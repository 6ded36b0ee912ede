"""Counter-based random numbers: a draw depends on what it is for, never on what was drawn before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from m3ae_fast import _checks

T = TypeVar("T")

# Streams: two that must not share numbers never do, whatever the seed.
SCENE, ORDER, SAMPLE, QUESTION, STATEMENT, PHRASE, CLUTTER, PAIRED, MIX, SPLIT = range(10)


def check_seed(seed: int) -> int:
    """A seed in [0, 2**63), handed back; ValueError or TypeError otherwise."""
    _checks.integer("seed", seed, 0, 2**63)
    return seed


def generator(seed: int, stream: int, epoch: int = 0, index: int = 0, source: int = 0) -> np.random.Generator:
    """The generator of one item: Philox4x64 keyed by (seed, stream), its counter starting at (epoch, index, source)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, source, index, epoch]))


def choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[rng.integers(len(options))]
