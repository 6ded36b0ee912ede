"""The learning rate: a pure function of the step, so that a resumed run cannot disagree with it."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then a cosine to 0 at `steps`.

    Args:
        step: steps already taken, in [0, steps).

    Source: arXiv:2111.06377, appendix A.1, as M3AE uses it.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
