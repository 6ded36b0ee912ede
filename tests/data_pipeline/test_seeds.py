"""Counter-based random numbers."""

import numpy as np

from m3ae_fast.data.seeds import SAMPLE, generator


def test_keys_never_meet():
    """Seed, stream, epoch and index each change the draw, at any size."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**63 - 1, 2, 2**40, 2**56)]
    draws = [tuple(generator(*key).integers(2**62, size=2)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(generator(*key).integers(2**62, size=2)) for key in keys]
    neighbors = [generator(0, SAMPLE, 0, i).integers(2**62, size=64) for i in range(8)]
    assert len(np.unique(neighbors)) == 8 * 64, "nor does one item's stream run on into the next one's"
