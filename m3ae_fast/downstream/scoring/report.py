"""Results: each figure beside its chance level, its standard error and the number of examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from m3ae_fast._files import write_json


@dataclasses.dataclass(frozen=True)
class Result:
    """A mean score over examples. Shares are in [0, 1].

    Attributes:
        name: of the figure, "accuracy" for instance.
        value: the mean.
        chance: what guessing reaches; None: not known.
        count: of examples.
        error: standard error of the mean, the examples taken as independent; None for a single example.
    """

    name: str
    value: float
    chance: float | None
    count: int
    error: float | None

    @classmethod
    def of(cls, name: str, scores: Iterable[float], chance: float | None = None) -> Result:
        """From the score of each example, in [0, 1] (True: 1).

        Raises:
            ValueError: there is none, or one is outside [0, 1].
        """
        scores = [float(score) for score in scores]
        if not scores:
            raise ValueError(f"scores must hold at least one, got none for {name!r}")
        for score in scores:
            if not 0 <= score <= 1:  # a NaN, too
                raise ValueError(f"scores must be in [0, 1], got {score} for {name!r}")
        count = len(scores)
        mean = math.fsum(scores) / count
        spread = math.fsum((score - mean) ** 2 for score in scores)
        error = math.sqrt(spread / (count - 1) / count) if count > 1 else None
        return cls(name, mean, chance, count, error)


def write(path: Path, results: Iterable[Result], about: dict | None = None) -> None:
    """Results as JSON, whole or not at all: {"about": {...}, "results": [{"name", "value", "chance", ...}, ...]}.

    Args:
        about: what was scored, the run and its data for instance.
    Raises:
        OSError: naming the file.
    """
    write_json(Path(path), {"about": about or {}, "results": [dataclasses.asdict(result) for result in results]})


def table(results: Iterable[Result]) -> str:
    """Lines for a reader, in percent:

               result   +/-   chance   examples
    accuracy     83.1   1.2     25.0      1,000
    """
    rows = [("", "result", "+/-", "chance", "examples")]
    for r in results:
        rows.append((r.name, _percent(r.value), _percent(r.error), _percent(r.chance), f"{r.count:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *figures in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(figures, widths[1:], strict=True))]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    """One decimal, or two digits of what is below one percent: a chance of 1 in 10,000 is no 0."""
    if share is None:
        return "-"
    percent = 100 * share
    return f"{percent:.1f}" if percent == 0 or percent >= 1 else f"{percent:.2g}"
