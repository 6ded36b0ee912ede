"""One seed of several numbers, for torch's generators."""

import numpy as np


def mixed_seed(seed: int, step: int) -> int:
    """A seed in [0, 2**32) that depends on every bit of both, which are not negative.

    On a CPU torch's generators take a seed's low 32 bits and drop the others.
    """
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
