"""Accuracies by kind, and what a guess reaches."""

import pytest

from m3ae_fast.downstream import Question, Statement, accuracies, chance


def question(answer, kind=""):
    return Question(None, "what?", answer, "x", kind)


def test_chance():
    questions = [question(a, k) for a, k in [("yes", "is"), ("yes", "is"), ("no", "is"), ("red", "c"), ("blue", "c")]]
    assert chance(questions) == (2 / 5, (2 + 1) / 5)
    assert chance(iter(questions[:3])) == (2 / 3, 2 / 3)
    statements = [Statement(None, None, "it is", label, "x") for label in (True, False, False, False)]
    assert chance(statements) == (3 / 4, 3 / 4)
    with pytest.raises(ValueError, match="examples must hold at least one, got none"):
        chance([])


def test_accuracies():
    kinds, truths = ["b", "a", "b", "a", "b"], ["no", "red", "yes", "blue", "no"]
    results = accuracies(kinds, truths, ["no", "red", "no", "red", "no"])
    assert [r.name for r in results] == ["accuracy", "accuracy, a", "accuracy, b"]
    assert [r.count for r in results] == [5, 2, 3]
    assert [r.value for r in results] == pytest.approx([3 / 5, 1 / 2, 2 / 3])
    assert [r.chance for r in results] == pytest.approx([3 / 5, 1 / 2, 2 / 3])
    assert [r.value for r in accuracies(kinds, truths, truths)] == [1, 1, 1]
    (alone,) = accuracies(["", ""], [True, False], [True, True])
    assert (alone.name, alone.value, alone.chance) == ("accuracy", 0.5, 0.5)


def test_accuracies_refuse():
    with pytest.raises(ValueError, match="kinds, truths and guesses must be of one length, got 2, 2, 1"):
        accuracies(["", ""], ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="must hold at least one, got none"):
        accuracies([], [], [])
