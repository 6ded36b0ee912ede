"""Accuracy over all examples and over each kind, beside what a guess reaches that sees no image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.examples import Question, Statement


class Chance(NamedTuple):
    """Accuracies of the best constant guesses, in [0, 1].

    Attributes:
        constant: one answer for everything: sees neither image nor question.
        by_kind: one answer for each kind of question: sees no image.
    """

    constant: float
    by_kind: float


def chance(examples: Iterable[Question | Statement]) -> Chance:
    """Accuracy of constant guesses on these examples: the most common answer of all, and that of each kind.

    Raises:
        ValueError: there is no example.
    """
    pairs = [(e.kind, e.label if isinstance(e, Statement) else e.answer) for e in examples]
    return _chance(*zip(*pairs, strict=True)) if pairs else _chance((), ())


def accuracies(kinds: Sequence[str], truths: Sequence[object], guesses: Sequence[object]) -> list[Result]:
    """The share of guesses that equal the truth: "accuracy" of all, then "accuracy, <kind>" where there are kinds.

    The chance level is that of the most common truth of each kind.

    Args:
        kinds, truths, guesses: of each example; a kind may be "".
    Raises:
        ValueError: they differ in length, or there is no example.
    """
    if not len(kinds) == len(truths) == len(guesses):
        raise ValueError(
            f"kinds, truths and guesses must be of one length, got {len(kinds)}, {len(truths)}, {len(guesses)}"
        )
    results = [_accuracy("accuracy", range(len(kinds)), kinds, truths, guesses)]
    names = sorted(set(kinds))
    for kind in names if len(names) > 1 else ():
        chosen = [i for i, k in enumerate(kinds) if k == kind]
        results.append(_accuracy(f"accuracy, {kind or 'no kind'}", chosen, kinds, truths, guesses))
    return results


def score_logits(logits: Tensor, labels: Tensor) -> Result:
    """Accuracy of logits [N, C] for labels [N] int64; chance is the commonest of the labels."""
    guesses = logits.argmax(1).tolist()
    return accuracies([""] * len(guesses), labels.tolist(), guesses)[0]


def _accuracy(name: str, chosen: Sequence[int], kinds, truths, guesses) -> Result:
    level = _chance([kinds[i] for i in chosen], [truths[i] for i in chosen]).by_kind
    return Result.of(name, [truths[i] == guesses[i] for i in chosen], level)


def _chance(kinds: Sequence[str], truths: Sequence[object]) -> Chance:
    if not truths:
        raise ValueError("examples must hold at least one, got none")
    commonest: dict[str, int] = {}
    for (kind, _), count in Counter(zip(kinds, truths, strict=True)).items():
        commonest[kind] = max(count, commonest.get(kind, 0))
    return Chance(max(Counter(truths).values()) / len(truths), sum(commonest.values()) / len(truths))
